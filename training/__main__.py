"""`python -m training CONFIG.yaml --out DIR`: train, export, evaluate, write the record.

`--resume CHECKPOINT --stage NAME` starts at a later stage from saved weights (optimizer state and
distractor bank start empty, as they do in the record of the shipped model).
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

from training import evaluate, export, loop, vocabulary
from training.config import TrainingConfig
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--resume", type=pathlib.Path, help="a checkpoint file of weights")
    parser.add_argument("--stage", help="the stage to start with; needs --resume")
    parser.add_argument("--eager", action="store_true", help="do not compile (no C compiler)")
    parser.add_argument("--lengths", default="512,4096,32768", help="token lengths to evaluate")
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()
    if (args.resume is None) != (args.stage is None):
        parser.error("--resume and --stage go together")
    cfg = TrainingConfig.read(args.config)
    names = [stage.name for stage in cfg.stages]
    if args.stage is not None and args.stage not in names:
        parser.error(f"--stage must be one of {', '.join(names)}")
    keep_memory()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    network = Network(cfg.network, compiled=not args.eager)
    if args.resume is not None:
        network.load_state_dict(torch.load(args.resume, weights_only=True))
    began = time.time()
    curve = loop.train(
        cfg, network, vocabulary.tokenizer(), args.out,
        start_stage=names.index(args.stage) if args.stage else 0,
        on_stage_end=lambda stage: export.export(network, args.out / f"export-{stage.name}"),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    export.export(network, args.out)
    shutil.copy(args.config, args.out / "training.yaml")
    lengths = [int(n) for n in args.lengths.split(",")]
    record = {
        "command": "python -m training " + " ".join(
            a if "/" not in a else pathlib.Path(a).name for a in sys.argv[1:]
        ),
        "seed": cfg.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": cfg.threads,
        "wall_clock_s": round(time.time() - began),
        "curve": curve,
        "evaluation": evaluation_table(args.out, lengths, args.questions, 20),
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "ascii")


if __name__ == "__main__":
    main()
