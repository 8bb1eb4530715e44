"""One engine at one length in a process of its own: `python -m bench.engine_case CASE`.

CASE is JSON (`Case`); the last line of the output is JSON: times in CPU seconds of this process,
which on one thread are the work done, whatever else runs on the machine; wall seconds beside them.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """`side`: ours or transformers. Both float32, with their cache, last position's logits only."""

    side: str
    folder: str
    tokens: int
    repeats: int
    steps: int
    """Decode steps after each prefill."""
    numerics: str
    kv: str
    chunk: int
    """Prompt tokens a call."""
    budget_s: float
    """No further repetition is begun after this much time."""
    seed: int
    threads: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Prefill = Callable[[list[int]], Any]
Step = Callable[[Any, int], Any]


def main() -> int:
    case = Case(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(case.threads)
    vocabulary, prefill, step, logits = (_ours if case.side == "ours" else _theirs)(case)
    rng = random.Random(case.seed)
    ready_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.monotonic()
    found: dict[str, Any] = {"prefill_cpu_s": [], "prefill_wall_s": [], "decode_cpu_s": []}
    with torch.inference_mode():
        # Code paths and allocator warm, at a length that costs little.
        state = prefill([rng.randrange(vocabulary) for _ in range(min(case.tokens, 256))])
        for _ in range(3):
            state = step(state, 1)
        for _ in range(case.repeats):
            tokens = [rng.randrange(vocabulary) for _ in range(case.tokens)]
            cpu_s, wall_s = time.process_time(), time.monotonic()
            state = prefill(tokens)
            found["prefill_cpu_s"].append(time.process_time() - cpu_s)
            found["prefill_wall_s"].append(time.monotonic() - wall_s)
            # Of the first prompt: sides may have time for different numbers of prompts.
            found.setdefault("logits", logits(state))
            times = []
            for token in tokens[: case.steps]:
                cpu_s = time.process_time()
                state = step(state, token)
                times.append(time.process_time() - cpu_s)
            found["decode_cpu_s"].append(sorted(times)[len(times) // 2])
            if time.monotonic() - began_s > case.budget_s:
                break
    found["loaded_mib"] = ready_kib / 1024
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))
    return 0


def _ours(case: Case) -> tuple[int, Prefill, Step, Callable[[Any], list[float]]]:
    """Through the `Engine` contract, in chunks as a prefill worker does it."""
    from model.engine import Segment
    from model.load import load_engine

    engine = load_engine(
        case.folder, kv_cache_dtype=case.kv, dtype="float32", numerics=case.numerics
    )
    held: list[Any] = []

    def prefill(tokens: list[int]) -> Any:
        while held:
            engine.release(held.pop())
        sequence = engine.open(len(tokens) + case.steps + 8)
        held.append(sequence)
        for at in range(0, len(tokens), case.chunk):
            engine.forward([Segment(sequence, tokens[at : at + case.chunk])])
        engine.logits([sequence]).row(0)
        return sequence

    def step(sequence: Any, token: int) -> Any:
        engine.forward([Segment(sequence, (token,))])
        engine.logits([sequence]).row(0)
        return sequence

    def logits(sequence: Any) -> list[float]:
        return [float(x) for x in engine.logits([sequence]).row(0)]

    return engine.info.vocab_size, prefill, step, logits


def _theirs(case: Case) -> tuple[int, Prefill, Step, Callable[[Any], list[float]]]:
    """transformers' own cache; a prompt in chunks too, which is faster there than one piece."""
    import torch
    import transformers

    # Its functions are not typed.
    theirs: Any = transformers
    theirs.logging.set_verbosity_error()
    theirs.logging.disable_progress_bar()
    model = theirs.DeepseekV4ForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()

    def run(tokens: list[int], cache: Any) -> Any:
        return model(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    def prefill(tokens: list[int]) -> Any:
        out, cache = None, None
        for at in range(0, len(tokens), case.chunk):
            out = run(tokens[at : at + case.chunk], cache)
            cache = out.past_key_values
        return out

    def step(state: Any, token: int) -> Any:
        return run([token], state.past_key_values)

    def logits(state: Any) -> list[float]:
        return [float(x) for x in state.logits[0, -1]]

    return int(model.config.vocab_size), prefill, step, logits


if __name__ == "__main__":
    raise SystemExit(main())
