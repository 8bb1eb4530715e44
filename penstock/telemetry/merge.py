"""Several processes' expositions as one: each family once, with the samples of all.

Works on lines, not on parsed values: a front merges what tens of workers tell beside its streams.
"""

from __future__ import annotations

from collections.abc import Iterable

from penstock.telemetry.metric import PREFIX

MOST_BYTES = 4 << 20
"""Of one process; a thousand times what a worker tells."""


def merge(texts: Iterable[bytes]) -> bytes:
    """Texts of `Meters.text`, in order. Lines that belong to no family of ours are left out."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        samples: list[str] | None = None
        for line in text.decode("utf-8", "replace").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if not name.startswith(PREFIX):
                    samples = None
                    continue
                head, samples = families.setdefault(name, ([], []))
                if len(head) < 2:
                    head.append(line)
            elif samples is not None and line.startswith(PREFIX):
                samples.append(line)
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return "".join(f"{line}\n" for line in lines).encode()
