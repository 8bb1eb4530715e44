"""Compiles `src/*.c` for the processor at hand and keeps the result in the user's cache folder.

The file's name is a digest of all that it depends on, so a stale one is never loaded. A folder
that cannot be written is replaced by one that lives as long as the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
QUIET = ("-fvisibility=hidden", "-Wno-psabi", "-std=gnu11")
TIMEOUT_S = 120.0


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here. One sentence."""


@dataclass(frozen=True)
class Library:
    """The loaded code, and a digest of all that it was made from."""

    code: ctypes.CDLL
    digest: str


def load_library(*, environ: Mapping[str, str] = os.environ) -> Library:
    """Compile if needed (about 2 s) and load. Raises `BuildError`."""
    compiler = shutil.which(environ.get("CC", "cc"))
    if compiler is None:
        raise BuildError("no C compiler was found; install one or set CC")
    sources = sorted(SOURCES.glob("*.c"))
    digest = _digest(compiler)
    path = _folder(environ) / f"{digest}.so"
    try:
        if not path.exists():
            _compile(compiler, sources, path)
        return Library(ctypes.CDLL(str(path)), digest)
    except OSError as error:
        raise BuildError(f"the compiled kernels cannot be loaded: {error}") from None


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    # Several workers may start at once: each writes its own file, the last name wins.
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, *QUIET, "-o", str(fresh), *map(str, sources)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} did not finish within {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise BuildError(f"{compiler} failed: {words[0] if words else done.returncode}")
    fresh.replace(path)


def _digest(compiler: str) -> str:
    """Sources, flags, compiler version and processor."""
    total = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        total.update(source.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    facts = (*FLAGS, *QUIET, version.stdout, platform.machine(), _processor())
    total.update("\0".join(facts).encode())
    return total.hexdigest()[:24]


def _processor() -> str:
    """Model and feature flags: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.partition(":")[0].strip(): line for line in lines if line.startswith(wanted)}
    return "\n".join(found[key] for key in sorted(found))


def _folder(environ: Mapping[str, str]) -> Path:
    root = environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(root) / "penstock" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="penstock-kernels-"))
