"""What a rank needs in memory, against what there is: the refusal before anything large is read.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.grid import Grid
from model.tensors import Expected, Kind, held_in_fp32
from penstock.errors import ModelLoadError

_GIB = 1 << 30
_FIXED_WORK_BYTES = 64 << 20
_PASS_ROWS = 1024


@dataclass(frozen=True)
class Need:
    """Bytes of one rank."""

    weights: int
    cache: int
    """One sequence of the longest admitted length."""
    work: int
    """Buffers of one pass; an estimate."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def weight_bytes(table: dict[str, Expected], grid: Grid, *, element_bytes: int) -> int:
    """What this rank's weights take once loaded: `element_bytes` a number, 4 what is computed in
    fp32, 8 the hash tables. FP8 and FP4 weights are held in the compute type (model.formats).
    """
    total = 0
    for name, weight in table.items():
        shape = weight.local_shape(grid)
        if shape is None:
            continue
        count = 1
        for size in shape:
            count *= size
        if weight.kind is Kind.INT64:
            total += 8 * count
        else:
            total += count * (4 if held_in_fp32(name, weight) else element_bytes)
    return total


def work_bytes(config: ModelConfig, grid: Grid) -> int:
    """Buffers of a pass of 1,024 rows and of a batch of 16 rows of logits; an estimate."""
    c = config
    streams = 4 * c.streams * c.hidden
    heads = 5 * (c.heads // grid.plane) * c.head_dim
    experts = c.active_experts * (2 * c.hidden + 3 * c.expert_width // grid.tp)
    return 4 * (_PASS_ROWS * (streams + heads + experts) + 16 * c.vocab_size) + _FIXED_WORK_BYTES


def check_fit(
    name: str,
    need: Need,
    grid: Grid,
    *,
    free: int,
    max_model_len: int,
    cache_of: Callable[[int], int],
    where: str = "this host",
) -> None:
    """Raise `ModelLoadError` with the numbers if `need` is more than the `free` bytes of `where`.

    `cache_of(tokens)`: bytes of a sequence's cache, to say which length would fit.
    """
    if need.total <= free:
        return
    rest = free - need.weights - need.work
    if rest >= cache_of(1):
        low, high = 1, max_model_len
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cache_of(middle) <= rest else (low, middle)
        step = f"lower --max-model-len from {max_model_len} to {low} or less, or use more ranks"
    else:
        step = f"use more ranks or more memory than {where} has"
    raise ModelLoadError(
        f"{name} needs {_gib(need.total)} a rank with tensor parallel {grid.tp} and expert "
        f"parallel {grid.ep} (weights {_gib(need.weights)}, cache for {max_model_len} tokens "
        f"{_gib(need.cache)}, work {_gib(need.work)}), {where} has {_gib(max(free, 0))} free; "
        f"{step}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / (1 << 20):.0f} MiB"


def free_host_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own_cgroup: Path = Path("/proc/self/cgroup"),
) -> int | None:
    """Memory that this process may still take: the kernel's estimate and every cgroup limit above
    it. None where the system says nothing.
    """
    found = [_available(meminfo), *_cgroup_room(cgroups, own_cgroup)]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room(root: Path, own: Path) -> list[int | None]:
    """cgroup v2: room below the limit of this process's group and of each group above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / path.strip("/")
    found: list[int | None] = []
    # Inside a container the path may be the host's, of which only the root is to be seen.
    for at in (group, *group.parents):
        found.append(_room(at))
        if at == root:
            break
    return found


def _room(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Cached file pages are given back under pressure.
    return int(limit) - used + int(stat.get("inactive_file", 0))
