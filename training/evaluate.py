"""Measure a `ledger`: exact match, hallucination, wrong refusals, citation, recall.

Names are held out of training; a part of the filler is text that training never saw (the Python
standard library of the interpreter that runs this). Answers are scored teacher-forced, which equals
greedy decoding when every answer of the conversation is right.

    python -m training.evaluate FOLDER --lengths 512,4096,32768 --questions 300
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer

from training import documents, export, filler
from training.batches import question_block
from training.network import Batch, Network, Select
from training.rounding import PLAIN, SERVED, Cache
from training.shares import wilson


@dataclass
class Tally:
    """Counts over questions."""

    answerable: int = 0
    exact: int = 0
    refused_wrongly: int = 0
    unanswerable: int = 0
    hallucinated: int = 0
    first_answerable: int = 0
    first_exact: int = 0
    cited: int = 0
    recalled: int = 0
    gold_mass: float = 0.0
    nll: float = 0.0
    conversations: int = 0
    conversations_right: int = 0
    errors: list[str] = field(default_factory=list)


def library_segment() -> Callable[[random.Random, int], str]:
    """Filler from the interpreter's own library files, which training never reads."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.glob("*.py") if p.stat().st_size > 20_000)

    def segment(rng: random.Random, size_chars: int) -> str:
        text = rng.choice(files).read_text("utf-8", errors="replace")
        at = rng.randrange(max(1, len(text) - size_chars))
        return text[at : at + size_chars]

    return segment


def mixed_segment() -> Callable[[random.Random, int], str]:
    """Half library text, half synthetic filler."""
    library = library_segment()

    def segment(rng: random.Random, size_chars: int) -> str:
        return library(rng, size_chars) if rng.random() < 0.5 else filler.segment(rng, size_chars)

    return segment


@torch.no_grad()
def ask(
    network: Network, tok: Tokenizer, document: documents.Document,
    questions: list[documents.Question], tally: Tally, *, cache: Cache = PLAIN,
    select: Select = "index",
) -> None:  # fmt: skip
    """One conversation about one document, added to `tally`."""
    pairs = [(q.name, q.answer) for q in questions]
    block, answers_at = question_block(random.Random(0), pairs, full=1.0)
    encoded = tok.encode(document.text + block)
    base = len(document.text)
    rows: list[int] = []
    firsts: list[int] = []

    def token_at(char: int) -> int:
        token = encoded.char_to_token(char)
        if token is None:
            raise ValueError(f"character {char} of the conversation has no token")
        return token

    for q, at in zip(questions, answers_at, strict=True):
        first = token_at(base + at)
        firsts.append(len(rows))
        rows += [first - 1 + j for j in range(1 if q.answer == documents.UNKNOWN else 4)]
    tokens = torch.tensor([encoded.ids])
    length = tokens.shape[1]
    index = torch.tensor(rows)
    batch = Batch(tokens, torch.arange(length)[None], torch.tensor([length]), index)
    logits, evidence = network(batch, cache=cache, select=select)
    said = logits.argmax(-1)
    target = tokens[0, index + 1]
    losses_R = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    unknown = tok.token_to_id(documents.UNKNOWN)
    all_right = True
    for number, (q, at) in enumerate(zip(questions, firsts, strict=True)):
        if q.answer == documents.UNKNOWN:
            tally.unanswerable += 1
            wrong = int(said[at]) != unknown
            tally.hallucinated += wrong
            all_right &= not wrong
            if wrong:
                tally.errors.append(f"{length}: {q.name} unknown, said a digit")
            continue
        right = bool((said[at : at + 4] == target[at : at + 4]).all())
        tally.answerable += 1
        tally.exact += right
        tally.refused_wrongly += int(said[at]) == unknown
        if number == 0:
            tally.first_answerable += 1
            tally.first_exact += right
        all_right &= right
        block_number = token_at(document.digits_at[q.name]) // 4
        gold = torch.tensor([[block_number, block_number + 1]])
        chosen, mass = evidence.chosen_RC[at], evidence.mass_HRC[:, at].mean(0)
        tally.cited += int(chosen[mass.argmax()] in gold[0])
        best = min(network.cfg.index_topk, evidence.index_RE.shape[1])
        tally.recalled += bool(torch.isin(evidence.index_RE[at].topk(best).indices, gold).any())
        tally.nll += float(losses_R[at : at + 4].sum())
        tally.gold_mass += float((mass * torch.isin(chosen, gold[0])).sum())
        if not right:
            words = [str(tok.id_to_token(int(i))) for i in said[at : at + 4]]
            tally.errors.append(f"{length}: {q.name} {q.answer} said {' '.join(words)}")
    tally.conversations += 1
    tally.conversations_right += all_right


def report(tally: Tally) -> dict[str, Any]:
    """Shares with intervals; `errors` keeps at most ten."""
    n, u = max(1, tally.answerable), max(1, tally.unanswerable)
    counts = {k: v for k, v in asdict(tally).items() if k not in ("errors", "gold_mass", "nll")}
    return counts | {
        "em": round(tally.exact / n, 4),
        "em_95": wilson(tally.exact, tally.answerable),
        "hallucination": round(tally.hallucinated / u, 4),
        "hallucination_95": wilson(tally.hallucinated, tally.unanswerable),
        "wrong_refusal": round(tally.refused_wrongly / n, 4),
        "citation": round(tally.cited / n, 4),
        "recall16": round(tally.recalled / n, 4),
        "gold_mass": round(tally.gold_mass / n, 4),
        "loss_per_digit": round(tally.nll / (4 * n), 5),
        "errors": tally.errors[:10],
    }


def measure(
    network: Network, tok: Tokenizer, *, tokens: int, facts: int, questions: int, seed: int,
    unanswerable: float = 0.35, per_document: int = 12, quantized: bool = False,
    segment: Callable[[random.Random, int], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`questions` questions (at least) about fresh documents of `tokens` tokens."""
    tally, asked = Tally(), 0
    segment = segment or mixed_segment()
    began = time.monotonic()

    def count(text: str) -> int:
        return len(tok.encode(text).ids)

    while asked < questions:
        seed += 1
        document = documents.make_document(
            seed, tokens_at_least=max(64, tokens - 13 * facts - 24 * per_document), facts=facts,
            count=count, accept=documents.held_out, segment=segment,
        )  # fmt: skip
        absent = round(per_document * unanswerable)
        picked = documents.make_questions(
            document, seed, min(facts, per_document - absent), absent, accept=documents.held_out
        )
        ask(network, tok, document, picked, tally, cache=SERVED if quantized else PLAIN)
        asked += len(picked)
    settings = {"tokens": tokens, "facts": facts, "quantized": quantized, "last_seed": seed}
    return settings | report(tally) | {"seconds": round(time.monotonic() - began, 1)}


def demo(
    network: Network, tok: Tokenizer, *, seeds: int, first_seed: int = 0, quantized: bool = False
) -> dict[str, Any]:
    """The setting of `penstock demo`: a fresh document of 33 000 tokens, ten questions, three of
    them unanswerable, any names; counts conversations without an error."""
    tally = Tally()

    def count(text: str) -> int:
        return len(tok.encode(text).ids)

    for seed in range(first_seed, first_seed + seeds):
        facts = random.Random(seed).randint(10, 40)
        document = documents.make_document(seed, tokens_at_least=33_000, facts=facts, count=count)
        ask(network, tok, document, documents.make_questions(document, seed, 7, 3), tally,
            cache=SERVED if quantized else PLAIN)  # fmt: skip
    return {"demo_seeds": seeds, "first_seed": first_seed, "quantized": quantized} | report(tally)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--lengths", default="512,4096,32768")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--demo-seeds", type=int, default=20)
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = export.load(args.folder)
    tok = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    results = []
    for length in map(int, filter(None, args.lengths.split(","))):
        results.append(measure(
            network, tok, tokens=length, facts=8 if length < 1024 else 32, seed=args.seed,
            questions=args.questions, quantized=args.quantized,
            per_document=8 if length < 1024 else 12,
        ))  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    if args.demo_seeds:
        results.append(demo(network, tok, seeds=args.demo_seeds, quantized=args.quantized))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", "ascii")


if __name__ == "__main__":
    main()
