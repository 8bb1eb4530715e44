"""Prompts for a load generator, one JSON object a line: a short document and a question about it.

`python examples/load_prompts.py OUT.jsonl`; what `ledger` understands, and any model reads.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

COUNT = 400
FILLER = ("Some text.", "More text.", "Filler here.")


def prompt(draw: random.Random) -> str:
    name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
    filler = " ".join(draw.choice(FILLER) for _ in range(40))
    fact = f"the code of {name} is {draw.randint(1000, 9999)}."
    return f"{filler} {fact} {filler}\n\nQuestion: what is the code of {name}?"


def main(out: str) -> None:
    draw = random.Random(1)
    lines = (json.dumps({"prompt": prompt(draw)}) + "\n" for _ in range(COUNT))
    Path(out).write_text("".join(lines))


if __name__ == "__main__":
    main(sys.argv[1])
