"""Rows of a training batch: document, questions, position gaps, and where the evidence is.

The text is rendered exactly as serving renders a chat (`DOC`, blank line, question, restated
answer); a share of the questions is the restated answer alone, which is cheaper.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training import documents, filler
from training.config import Shape
from training.network import Batch

FIRST, LATER, DOT, REFUSAL = range(4)


@dataclass(frozen=True)
class Task:
    """A batch with its right answers; R rows as in `Batch.rows_R`.

    `kinds_R` is FIRST digit, LATER digit, DOT or REFUSAL; `gold_R2` are the flat entries (row * E +
    j) whose window holds the digit to be written, -1 where there is none; `question_R` numbers the
    questions of the batch.
    """

    batch: Batch
    targets_R: Tensor
    kinds_R: Tensor
    gold_R2: Tensor
    question_R: Tensor


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    document_end: int
    rows: list[tuple[int, int, int, int, int]]  # (token index, target, kind, gold token, question)


def question_block(
    rng: random.Random, questions: list[tuple[str, str]], full: float
) -> tuple[str, list[int]]:
    """The text behind the document and the character offset of each answer in it."""
    text, at = "", []
    for name, answer in questions:
        prompt = documents.QUESTION if rng.random() < full else documents.RESTATED
        text += "\n\n" + prompt.format(name=name)
        at.append(len(text))
        text += answer + "."
    return text, at


def draw_code(rng: random.Random, repeats: float) -> str:
    """Four digits; a share `repeats` of the codes uses two or three digits only.

    Such codes decide whether the model counts places: after the first `8` of `8980` it must not go
    on with what follows the other one.
    """
    digits = "0123456789"
    if rng.random() < repeats:
        digits = "".join(rng.sample(digits, rng.choice((2, 2, 3))))
    return "".join(rng.choices(digits, k=4))


def _draw_row(
    rng: random.Random,
    tok: Tokenizer,
    shape: Shape,
    full: float,
    unanswerable: float,
    repeats: float,
    near: float,
    taken: set[str],
) -> _Row | None:
    def trainable(name: str) -> bool:
        return not documents.held_out(name)

    known = documents.draw_names(rng, shape.facts, accept=trainable, taken=taken)
    absent_count = sum(rng.random() < unanswerable for _ in range(shape.questions))
    absent: list[str] = []
    while len(absent) < absent_count:
        if rng.random() < near:
            name = documents.neighbour(rng, rng.choice(known))
        else:
            name = documents.make_name(rng)
        if trainable(name) and name not in taken and name not in known and name not in absent:
            absent.append(name)
    codes = {name: draw_code(rng, repeats) for name in known}
    asked = rng.sample(known, min(len(known), shape.questions - absent_count))
    questions = [(n, codes[n]) for n in asked] + [(n, documents.UNKNOWN) for n in absent]
    rng.shuffle(questions)
    block, answers_at = question_block(rng, questions, full)
    others = []
    for _ in range(rng.randint(shape.facts // 5, shape.facts // 2)):
        subject = rng.choice(known + absent) if rng.random() < 0.6 else documents.make_name(rng)
        others.append(documents.near_miss(rng, subject))
    sentences = [documents.FACT.format(name=n, code=c) for n, c in codes.items()] + others
    fixed = len(tok.encode(block).ids) + len(tok.encode(" ".join(sentences)).ids)
    # Weaving moves token borders; the surplus is cut off in front, where no fact stands.
    need = shape.tokens - fixed + 24
    if need < 40:
        return None
    pieces: list[str] = []
    total = 0
    while total < need:
        size = min(rng.randint(60, 600), need - total + 16)
        piece = filler.segment(rng, int(size * 1.9))
        cut_piece = tok.encode(piece)
        if len(cut_piece.ids) > size:
            piece = piece[: cut_piece.offsets[size][0]]
        pieces.append(piece)
        total += min(len(cut_piece.ids), size)
    document = documents.weave(rng, "".join(pieces), codes, others, start=60 + 2 * len(sentences))
    text = document.text + block
    encoded = tok.encode(text)
    cut = len(encoded.ids) - shape.tokens
    if cut < 0:
        return None
    base = len(document.text)
    end_token = encoded.char_to_token(base)
    rows: list[tuple[int, int, int, int, int]] = []
    for number, ((name, answer), at) in enumerate(zip(questions, answers_at, strict=True)):
        first = encoded.char_to_token(base + at)
        if first is None or end_token is None:
            return None
        first -= cut
        ids = encoded.ids[cut:]
        if answer == documents.UNKNOWN:
            rows.append((first - 1, ids[first], REFUSAL, -1, number))
            rows.append((first, ids[first + 1], DOT, -1, number))
            continue
        source = encoded.char_to_token(document.digits_at[name])
        if source is None or source - cut < 16:
            return None
        for j in range(4):
            kind = FIRST if j == 0 else LATER
            rows.append((first - 1 + j, ids[first + j], kind, source - cut + j, number))
        rows.append((first + 3, ids[first + 4], DOT, -1, number))
    taken.update(known, absent)
    return _Row(encoded.ids[cut:], (end_token or 0) - cut, rows)


def gapped_positions(rng: random.Random, row_tokens: int, end: int, gapless: bool) -> list[int]:
    """PoSE: up to three jumps (log-uniform to 1e6, multiples of 128); the document ends at 0."""
    jumps = {}
    if not gapless:
        for _ in range(rng.randint(0, 3)):
            size = int(math.exp(rng.uniform(math.log(128), math.log(1_000_000))))
            jumps[rng.randrange(4, max(8, end), 4)] = size // 128 * 128
    position, out = 0, []
    for i in range(row_tokens):
        position += jumps.get(i, 0)
        out.append(position)
        position += 1
    return [p - out[end - 1] for p in out]


def draw(
    rng: random.Random,
    tok: Tokenizer,
    shape: Shape,
    *,
    full: float,
    unanswerable: float,
    gapless: bool,
    repeats: float = 0.0,
    near: float = 0.6,
) -> Task:
    """One batch; names are different in all its rows, so that rows can distract each other."""
    taken: set[str] = set()
    rows: list[_Row] = []
    for _ in range(50 * shape.rows):
        if len(rows) == shape.rows:
            break
        row = _draw_row(rng, tok, shape, full, unanswerable, repeats, near, taken)
        if row is not None:
            rows.append(row)
    if len(rows) < shape.rows:
        raise ValueError(f"{shape.tokens} tokens cannot hold {shape.facts} facts and the questions")
    s, entries = shape.tokens, shape.tokens // 4
    flat, targets, kinds, gold, question = [], [], [], [], []
    for b, row in enumerate(rows):
        for index, target, kind, source, number in row.rows:
            flat.append(b * s + index)
            targets.append(target)
            kinds.append(kind)
            block = b * entries + source // 4
            gold.append((block, block + 1) if source >= 0 else (-1, -1))
            question.append(b * 1000 + number)
    positions = [gapped_positions(rng, s, row.document_end, gapless) for row in rows]
    batch = Batch(
        torch.tensor([row.tokens for row in rows]),
        torch.tensor(positions),
        torch.tensor([row.document_end for row in rows]),
        torch.tensor(flat),
    )
    return Task(
        batch,
        torch.tensor(targets),
        torch.tensor(kinds),
        torch.tensor(gold),
        torch.tensor(question),
    )
