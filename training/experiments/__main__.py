"""`python -m training.experiments [NAME...]`: run, write JSON and PNG. A run that is cut off is
gone on with: a variant whose line stands in the JSON is not run again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

import torch

from training import loop, vocabulary
from training.curves import draw
from training.errors import TrainingError
from training.experiments.plan import EXPERIMENTS, Experiment, config
from training.experts import Experts
from training.network import Network

RESULTS = pathlib.Path(__file__).parent / "results"


class Watch:
    """What a stabiliser is meant to hold down: growth of the streams, of SwiGLU, of the load."""

    def __init__(self, network: Network) -> None:
        self.stream, self.swiglu, self.load = 0.0, 0.0, 0.0
        self._network = network
        for module in network.modules():
            if isinstance(module, Experts):
                module.w2.register_forward_pre_hook(self._hidden)
        network.norm.register_forward_pre_hook(self._streams)

    def _hidden(self, module: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]):
            self.swiglu = max(self.swiglu, float(args[0].detach().abs().max()))

    def _streams(self, module: object, args: tuple[torch.Tensor, ...]) -> None:
        self.stream = max(self.stream, float(args[0].detach().square().mean().sqrt()))

    def after_step(self) -> None:
        """Largest load of an expert against the mean, over routers that choose."""
        for moe in self._network.routers():
            if not moe.gate.hashed and moe.load is not None:
                self.load = max(self.load, float(moe.load.max() / moe.load.float().mean()))

    def take(self) -> dict[str, float]:
        """Maxima since the last call."""
        out = {"stream_rms": self.stream, "swiglu_max": self.swiglu, "load_max": self.load}
        self.stream, self.swiglu, self.load = 0.0, 0.0, 0.0
        return {key: round(value, 4) for key, value in out.items()}


def run_variant(changes: Any) -> dict[str, Any]:
    """One training of the base with `changes`: its curve, losses of every step, how it ended."""
    cfg = config(changes)
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    network = Network(cfg.network)
    watch, watched, steps = Watch(network), [], []
    spikes: list[str] = []

    def on_step(step: int, loss: float) -> None:
        watch.after_step()
        steps.append(round(loss, 4))
        if step % cfg.log_every == 0:
            watched.append({"step": step, **watch.take()})

    began_s, curve, ended = time.process_time(), [], "whole"
    with tempfile.TemporaryDirectory() as folder:
        try:
            curve = loop.train(
                cfg, network, vocabulary.tokenizer(), pathlib.Path(folder), on_step=on_step,
                say=lambda line: spikes.append(line) if "spike" in line else None,
            )  # fmt: skip
        except TrainingError as error:
            ended = error.message
    return {
        "changes": dict(changes), "ended": ended, "curve": curve, "watched": watched,
        "losses": steps, "rollbacks": [json.loads(line) for line in spikes],
        "cpu_s": round(time.process_time() - began_s, 1),
    }  # fmt: skip


def run(name: str, experiment: Experiment) -> None:
    """All variants of one experiment; results are kept after each."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    known: dict[str, Any] = {}
    if path.exists():
        known = json.loads(path.read_text("ascii"))["variants"]
    variants = {
        each: known[each]
        for each, changes in experiment.variants.items()
        if each in known and known[each]["changes"] == dict(changes)
    }
    for each, changes in experiment.variants.items():
        if each not in variants:
            variants[each] = run_variant(changes)
            last = variants[each]["curve"][-1:] or [{}]
            print(name, each, json.dumps(last[0]), flush=True)
        whole = {
            "experiment": name, "question": experiment.question, "torch": torch.__version__,
            "machine": platform.machine(), "base": config().model_dump(mode="json"),
            "variants": {key: variants[key] for key in experiment.variants if key in variants},
        }  # fmt: skip
        path.write_text(json.dumps(whole) + "\n", "ascii")
    lines = {
        key: [(step + 1.0, loss) for step, loss in enumerate(_smooth(value["losses"]))]
        for key, value in variants.items()
    }
    draw(
        lines, RESULTS / f"{name}.png", x="step", y="training loss, mean of 5 steps",
        title=experiment.question, log=True,
    )  # fmt: skip


def _smooth(values: list[float], over: int = 5) -> list[float]:
    return [
        sum(values[max(0, i - over + 1) : i + 1]) / len(values[max(0, i - over + 1) : i + 1])
        for i in range(len(values))
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(EXPERIMENTS))
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"no experiment is called {', '.join(sorted(unknown))}")
    for name in args.names or EXPERIMENTS:
        run(name, EXPERIMENTS[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
