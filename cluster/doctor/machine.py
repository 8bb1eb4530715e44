"""The machine: Python, memory, shared memory, disk, open files, compiler, device and driver."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.doctor.finding import Finding
from model.plan import free_host_bytes
from penstock.settings import format_size

_SHM = Path("/dev/shm")
_DRIVER = Path("/proc/driver/nvidia/version")
_LEAST_DISK_BYTES = 2 << 30
"""A Ray session, logs and the compiled kernels."""
_LEAST_DRIVERS = {12: 525, 13: 580}
"""By CUDA's major version: the oldest driver that runs its code (NVIDIA's CUDA compatibility
table)."""
_FILES_FOR_OTHERS = 512
_PROGRAM = "int main(void) { return 0; }\n"


def machine(config: ClusterConfig) -> Iterator[Finding]:
    yield python()
    yield device(config.model.device)
    yield compiler()
    yield memory(config)
    yield shared_memory(config)
    yield disk(Path(tempfile.gettempdir()))
    yield open_files(config)


def python() -> Finding:
    number = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", f"python {number}, {len(os.sched_getaffinity(0))} cores")


def device(wanted: str) -> Finding:
    """GPU, driver, and a torch that fits both; without a GPU that none is asked for."""
    rows = _nvidia_smi()
    if rows is None:
        if wanted == "cuda":
            return Finding("device", *_without_gpu())
        if _DRIVER.exists():
            what, fix = _without_gpu()
            return Finding("device", what, fix, fatal=False)
        return Finding("device", "no GPU; models run on the CPU")
    what = "GPU: " + "; ".join(", ".join(row) for row in rows)
    built = _torch_cuda()
    if built is None:
        fix = (
            "the installed torch has no CUDA: `pip install torch --index-url "
            "https://download.pytorch.org/whl/cu130` to use the GPU, or --device cpu"
        )
        return Finding("device", what, fix, fatal=wanted == "cuda")
    least = _LEAST_DRIVERS.get(built)
    driver = rows[0][1] if len(rows[0]) > 1 else ""
    major = int(driver.split(".")[0]) if driver.split(".")[0].isdigit() else None
    if least is not None and major is not None and major < least:
        return Finding(
            "device",
            what,
            f"driver {driver} is too old for the CUDA {built} of the installed torch: install "
            f"driver {least} or later, or --device cpu",
            fatal=wanted != "cpu",
        )
    return Finding("device", what)


def _without_gpu() -> tuple[str, str]:
    if shutil.which("nvidia-smi") is None and not _DRIVER.exists():
        return (
            "no GPU: neither nvidia-smi nor a driver is here",
            "install NVIDIA's driver (in a container: start it with --gpus all), or --device cpu",
        )
    return (
        "an NVIDIA driver is here, but no GPU answers to nvidia-smi",
        "run `nvidia-smi` to see why (in a container: start it with --gpus all), or --device cpu",
    )


def _nvidia_smi() -> list[list[str]] | None:
    """Name, driver and memory of each GPU; None if none answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if row != [""]] or None if done.returncode == 0 else None


def _torch_cuda() -> int | None:
    """Major version of the CUDA that torch was built for; None for a build without one.

    From the wheel's name: importing torch would take seconds. PyPI's own wheels for Linux carry no
    such name and bring CUDA as packages beside them.
    """
    try:
        local = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return None
    if local:
        found = re.fullmatch(r"cu(\d{2})\d+.*", local)
        return int(found.group(1)) if found else None
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"):
        try:
            return int(version(name).split(".")[0])
        except (PackageNotFoundError, ValueError):
            continue
    return None


def compiler() -> Finding:
    """Whether the CPU's kernels can be compiled at first use."""
    name = os.environ.get("CC", "cc")
    found = shutil.which(name)
    fix = (
        "install one (Debian: `apt install gcc libc6-dev`) or set CC; without it models run slower"
    )
    if found is None:
        return Finding("compiler", f"there is no C compiler '{name}'", fix, fatal=False)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(f"#include <math.h>\n#include <stdint.h>\n{_PROGRAM}")
        command = [found, "-O1", "-shared", "-fPIC", "-o", f"{folder}/probe.so", str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = type(error).__name__
            return Finding("compiler", f"{found} does not run: {reason}", fix, fatal=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        return Finding("compiler", f"{found} cannot compile: {reason}", fix, fatal=False)
    return Finding("compiler", f"C compiler {found}")


def memory(config: ClusterConfig) -> Finding:
    wanted = config.kvstore.memory_bytes
    wanted += config.prefill.replicas * config.prefill.kv_memory_bytes
    wanted += config.decode.replicas * config.decode.kv_memory_bytes
    free = free_host_bytes()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"caches of up to {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory free"
    if wanted > free:
        fix = "lower --kv-memory and --decode-kv-memory, or free some: caches fill as they are used"
        return Finding("memory", what, fix, fatal=False)
    return Finding("memory", what)


def shared_memory(config: ClusterConfig, shm: Path = _SHM) -> Finding:
    """Ray keeps its object store there, torch its tensors between ranks."""
    if not shm.is_dir():
        return Finding(
            "shared_memory", f"there is no {shm}", "mount a tmpfs there", fatal=_uses_ray(config)
        )
    free = shutil.disk_usage(shm).free
    wanted = config.launcher.object_store_bytes
    what = f"{free / 2**20:,.0f} MiB of shared memory free in {shm}"
    if free < wanted and _uses_ray(config):
        return Finding(
            "shared_memory",
            what,
            f"Ray's object store wants {format_size(wanted)}: start the container with "
            "--shm-size=1g, or --launcher local",
        )
    return Finding("shared_memory", what)


def disk(temporary: Path) -> Finding:
    """Where Ray's sessions and compiled code go."""
    try:
        free = shutil.disk_usage(temporary).free
    except OSError as error:
        return Finding("disk", f"cannot look at {temporary}: {error.strerror}", "set TMPDIR")
    what = f"{free / 2**30:.1f} GiB free in {temporary}"
    if not os.access(temporary, os.W_OK):
        return Finding("disk", f"{temporary} cannot be written", "set TMPDIR to a folder that can")
    if free < _LEAST_DISK_BYTES:
        fix = f"free {format_size(_LEAST_DISK_BYTES)} there or set TMPDIR to a larger disk"
        return Finding("disk", what, fix, fatal=free < _LEAST_DISK_BYTES // 8)
    return Finding("disk", what)


def open_files(config: ClusterConfig) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * config.front.max_streams + _FILES_FOR_OTHERS
    what = f"up to {soft:,} open files a process"
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = f"`ulimit -n {wanted}`" if hard < 0 or hard >= wanted else "raise the hard limit"
        fix = f"{more} before `penstock serve`, or lower front.max_streams"
        return Finding("open_files", what, fix, fatal=False)
    return Finding("open_files", what)


def _uses_ray(config: ClusterConfig) -> bool:
    return config.launcher.kind == "ray"
