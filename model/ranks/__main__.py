"""A follower as a process: `python -m model.ranks`, its order in the first line of stdin.

stdin is the leash: at its end the process ends, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from model.open import follow_rank
from model.ranks.followers import Order
from penstock.errors import PenstockError

_STDIN = 0


def _first_line() -> str:
    # Unbuffered: what follows belongs to the leash.
    line = bytearray()
    while (byte := os.read(_STDIN, 1)) and byte != b"\n":
        line += byte
    return line.decode()


def _end_with_stdin() -> None:
    while os.read(_STDIN, 4096):
        continue
    # It may be deep in a product or waiting for another rank; there is nothing to put away.
    os._exit(0)


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    order = Order.model_validate_json(_first_line())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        follow_rank(order)
    except PenstockError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 1
    except (OSError, EOFError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # gloo's threads must not hold up the end of a rank that others wait for.
    code = main()
    sys.stdout.flush()
    os._exit(code)
