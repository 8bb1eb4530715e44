"""`penstock eval --in-process`: which entries are read, and in which format, side by side.

The network runs without a cluster, whole conversations at a time and teacher-forced (which equals
greedy answers as long as every answer is right), in float32 with the cache's roundings put in. The
same sheets as through HTTP; all variants see the same documents. Imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from bench.quality import plot
from bench.quality.plot import length_name
from bench.quality.sheets import Kind, Sheet, needle_sheet
from bench.report import Report, publish
from penstock.errors import UsageError
from penstock.folder import model_folder
from training import evaluate, export
from training.documents import Document, Question
from training.network import Network, Select
from training.rounding import PLAIN, SERVED, Cache

_SHOWS_NOT = (
    "the serving engine: this is the training network, which tests hold to the same function",
    "single questions: all questions of a document are turns of one conversation",
)


@dataclass(frozen=True)
class Variant:
    """One way to read the same cache, or the same entries from another cache."""

    name: str
    select: Select = "index"
    cache: Cache = PLAIN


VARIANTS = (
    Variant("index top-k, fp32 cache"),
    Variant("all entries (dense)", "dense"),
    Variant("random top-k", "random"),
    Variant("latest k", "recent"),
    Variant("bf16 cache", cache=Cache("bf16", "bf16")),
    Variant("fp8 cache, bf16 index", cache=Cache("fp8", "bf16")),
    Variant("fp8 cache, fp4 index (served)", cache=SERVED),
    Variant("fp4 cache, fp4 index", cache=Cache("fp4", "fp4")),
)


def conversation(sheet: Sheet) -> tuple[Document, list[Question]]:
    """A sheet as training's document and questions: the code begins five characters before the end
    of its fact.
    """
    facts = {q.name: q.expected for q in sheet.questions if q.fact is not None}
    digits_at = {q.name: q.fact[1] - 5 for q in sheet.questions if q.fact is not None}
    asked = [Question(q.name, q.text, q.expected) for q in sheet.questions]
    return Document(sheet.text, facts, digits_at), asked


def compare(
    network: Network, tok: Tokenizer, made: Sequence[Sheet], variants: Sequence[Variant], seed: int
) -> list[dict[str, Any]]:
    """One row for each variant, over all sheets (of one length)."""
    rows = []
    for variant in variants:
        torch.manual_seed(seed)
        tally, began_s = evaluate.Tally(), time.monotonic()
        for sheet in made:
            document, asked = conversation(sheet)
            evaluate.ask(
                network, tok, document, asked, tally, cache=variant.cache, select=variant.select
            )
        got = evaluate.report(tally)
        keep = (
            "answerable", "exact", "em", "em_95", "unanswerable", "hallucinated", "hallucination",
            "hallucination_95", "citation", "recall16", "gold_mass", "loss_per_digit",
        )  # fmt: skip
        rows.append(
            {"variant": variant.name, "tokens": made[0].tokens}
            | {key: got[key] for key in keep}
            | {"seconds": round(time.monotonic() - began_s, 1)}
        )
    return rows


def run(
    model: str, *, suite: str, lengths: Sequence[int], questions: int, seed: int,
    json_path: Path | None, plot_path: Path | None,
) -> int:  # fmt: skip
    """Compares all variants at every length; `suite` must be one that asks single facts."""
    if suite not in ("needle", "all"):
        raise UsageError(f"--in-process compares suite needle; '{suite}' is asked through a server")
    folder = model_folder(model)
    if folder is None:
        raise UsageError(f"--in-process needs a model folder; '{model}' has no weights")
    if plot_path is not None:
        plot.drawing()
    began_s, console = time.monotonic(), Console()
    torch.set_num_threads(1)
    network = export.load(folder)
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tok.encode(text).ids)

    tables: dict[str, list[dict[str, Any]]] = {}
    needles = sum(q.kind is Kind.NEEDLE for q in needle_sheet(4096, seed, count).questions)
    for tokens in lengths:
        wanted = range(-(-questions // needles))
        made = [needle_sheet(tokens, seed + number, count) for number in wanted]
        tables[length_name(tokens)] = compare(network, tok, made, VARIANTS, seed)
        report = Report(
            bench="quality-in-process",
            settings={"model": Path(model).name, "lengths": list(lengths), "seed": seed,
                      "questions": questions},
            tables=tables, shows_not=_SHOWS_NOT, wall_s=time.monotonic() - began_s,
        )  # fmt: skip
        if json_path is not None:
            json_path.write_text(report.to_json() + "\n", encoding="utf-8")
        if plot_path is not None:
            _bars(tables, plot_path)
    publish(report, None, console)
    return 0


def _bars(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Exact match of every variant by length, with its interval."""
    figure = plot.drawing().Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(VARIANTS)
    for number, variant in enumerate(VARIANTS):
        rows = [table[number] for table in tables.values()]
        at = [x + number * width for x in range(len(rows))]
        shares = [row["em"] for row in rows]
        below = [max(0.0, row["em"] - row["em_95"][0]) for row in rows]
        above = [max(0.0, row["em_95"][1] - row["em"]) for row in rows]
        axes.bar(at, shares, width, label=variant.name, yerr=[below, above])
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(tables))], list(tables))
    axes.set_xlabel("tokens of the document")
    axes.set_ylabel("exact match, 95 % interval")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
