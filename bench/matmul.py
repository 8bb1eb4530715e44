"""A plain torch matmul of known size, in a process of its own: `python -m bench.matmul THREADS`.

Prints GFLOP/s of the best of some rounds. The yardstick of `penstock bench engine`; best, because
it shall say what the machine can do.
"""

from __future__ import annotations

import sys
import time

SIDE = 1024
ROUNDS = 5


def main() -> int:
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(a, b)
    least_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        torch.mm(a, b)
        least_s = min(least_s, time.perf_counter() - began_s)
    print(2 * SIDE**3 / 1e9 / least_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
