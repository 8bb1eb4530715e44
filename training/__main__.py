"""`python -m training CONFIG.yaml --out DIR`: train, export, evaluate, write the record.

`--resume latest` goes on where the newest checkpoint of DIR was taken; every later loss is the
same as without the interruption. `--weights FOLDER --stage NAME` starts at a later stage from an
exported model (optimizer state and distractor bank start empty, as in the record of the shipped
one).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from penstock.errors import PenstockError, UsageError
from training import checkpoint, evaluate, export, loop, vocabulary
from training.config import TrainingConfig
from training.curves import Sink
from training.errors import CheckpointError
from training.network import Network


def keep_memory() -> bool:
    """Ask glibc not to give freed memory back: fresh pages cost more than the arithmetic here.

    Returns whether the C library took the settings; another C library simply runs slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28), (arena_max, 1))
    return all(mallopt(key, value) == 1 for key, value in settings)


def evaluation_table(
    folder: pathlib.Path, lengths: Iterable[int], questions: int, demo_seeds: int
) -> list[dict[str, Any]]:
    """All rows of the record: each length plain and with serving's roundings, then the demo."""
    network, tok = export.load(folder), vocabulary.tokenizer()
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for quantized in (False, True):
            rows.append(evaluate.measure(
                network, tok, tokens=length, facts=8 if length < 1024 else 32, seed=5000,
                questions=questions, quantized=quantized, per_document=8 if length < 1024 else 12,
            ))  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if demo_seeds:
        rows.append(evaluate.demo(network, tok, seeds=demo_seeds, quantized=True))
    return rows


def prepare(out: pathlib.Path, resume: str | None) -> pathlib.Path | None:
    """The checkpoint to go on from, or None; `latest` takes the newest of `out`.

    Raises `TrainingError` if `out` holds a run and nobody asked to go on with it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {out}: {error.strerror}; check --out") from error
    found = checkpoint.known(out)
    if resume is None:
        if found:
            raise CheckpointError(
                f"{out} holds a run up to {found[-1].name}; go on with --resume latest, or give "
                "another --out"
            )
        return None
    if resume != "latest":
        return pathlib.Path(resume)
    if not found:
        raise CheckpointError(f"{out} has no checkpoint to go on from; leave --resume out")
    return found[-1]


def run(
    config: pathlib.Path, out: pathlib.Path, *, resume: str | None = None,
    weights: pathlib.Path | None = None, stage: str | None = None, eager: bool = False,
    lengths: Iterable[int] = (512, 4096, 32_768), questions: int = 300,
) -> None:  # fmt: skip
    """Train, export, evaluate, write the record. Raises `PenstockError`."""
    cfg = TrainingConfig.read(config)
    names = [each.name for each in cfg.stages]
    if (weights is None) != (stage is None):
        raise UsageError("--weights and --stage go together: which weights, from which stage on")
    if stage is not None and stage not in names:
        raise UsageError(f"--stage is '{stage}'; this configuration has {', '.join(names)}")
    start = prepare(out, resume)
    keep_memory()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    network = Network(cfg.network, compiled=not eager)
    if weights is not None:
        network.load_state_dict(export.load(weights).state_dict())
    began = time.time()
    sink = Sink(out, bar=sys.stderr.isatty())
    try:
        curve = loop.train(
            cfg, network, vocabulary.tokenizer(), out,
            start_stage=names.index(stage) if stage else 0, resume=start, sink=sink,
            on_stage_end=lambda each: export.export(network, out / f"export-{each.name}"),
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    finally:
        sink.close()
    export.export(network, out)
    shutil.copy(config, out / "training.yaml")
    given = sys.argv[1:]
    record = {
        "command": "python -m training " + " ".join(
            a if "/" not in a else pathlib.Path(a).name for a in given
        ),
        "seed": cfg.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": cfg.threads,
        "wall_clock_s": round(time.time() - began),
        "curve": curve,
        "evaluation": evaluation_table(out, lengths, questions, 20 if questions else 0),
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "ascii")


def main() -> int:
    """Command line; an error is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--resume", help="a checkpoint of this configuration, or `latest`")
    parser.add_argument("--weights", type=pathlib.Path, help="an exported folder to begin with")
    parser.add_argument("--stage", help="the stage to start with; needs --weights")
    parser.add_argument("--eager", action="store_true", help="do not compile (no C compiler)")
    parser.add_argument("--lengths", default="512,4096,32768", help="token lengths to evaluate")
    parser.add_argument("--questions", type=int, default=300, help="of each length; 0: none")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",") if args.questions]
    try:
        run(
            args.config, args.out, resume=args.resume, weights=args.weights, stage=args.stage,
            eager=args.eager, lengths=lengths, questions=args.questions,
        )  # fmt: skip
    except PenstockError as error:
        print(f"penstock: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
