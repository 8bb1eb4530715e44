"""Brings a model folder to a place, and refuses it unless its digest is the one that was asked for.

The digest of a folder is SHA-256 over its manifest: one line `SHA256  PATH\\n` a file, sorted by
path, as `sha256sum` writes them. Hidden files are left out. A folder is fetched beside its place
and moved there only once it is whole and right: a broken fetch leaves nothing that could be served.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError, UsageError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CHUNK_BYTES = 8 << 20
_CHECKED = ".penstock-checked"

Progress = Callable[[str, int], None]
"""Called with a file's name and the bytes just read of it."""


def folder_digest(folder: Path, *, weights: bool, progress: Progress | None = None) -> str:
    """`sha256:...` of the folder, or of what is no weight in it. Raises `ModelLoadError`."""
    lines = []
    for path in _files(folder, weights=weights):
        name = path.relative_to(folder).as_posix()
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    if progress is not None:
                        progress(name, len(chunk))
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
        lines.append(f"{digest.hexdigest()}  {name}\n")
    if not lines:
        raise ModelLoadError(f"there is no model at {folder}: the folder holds no file")
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def fetch(
    destination: Path,
    *,
    source: str | None,
    revision: str | None,
    digest: str | None,
    weights: bool,
    progress: Progress | None = None,
) -> str:
    """The digest of what is at `destination` afterwards.

    `source`: `hub:ORG/NAME`, or a folder's URL that fsspec reads; None only checks what is there.
    Nothing is fetched if the folder is there and right. Several may be called at once for one
    place: one fetches, the others wait. Raises `ModelLoadError` or `UsageError`.
    """
    if source is None:
        if not destination.is_dir():
            raise ModelLoadError(f"there is no model at {destination}; name one with --from")
        return _checked(destination, digest, weights=weights, progress=progress)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _alone(destination):
        if destination.is_dir():
            return _checked(destination, digest, weights=weights, progress=progress)
        with tempfile.TemporaryDirectory(
            prefix=f".{destination.name}.", dir=destination.parent
        ) as beside:
            fresh = Path(beside) / "model"
            fresh.mkdir()
            if source.startswith("hub:"):
                _from_hub(source.removeprefix("hub:"), fresh, revision, weights=weights)
            else:
                _from_url(source, fresh, weights=weights, progress=progress)
            found = _checked(fresh, digest, weights=weights, progress=progress)
            fresh.rename(destination)
    return found


def _files(folder: Path, *, weights: bool) -> list[Path]:
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (weights or path.suffix not in WEIGHTS)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _checked(folder: Path, digest: str | None, *, weights: bool, progress: Progress | None) -> str:
    """The folder's digest, which must be `digest`. Read anew only if a file has changed since."""
    state = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in _files(folder, weights=weights)
    ]
    note = folder / f"{_CHECKED}{'' if weights else '-small'}"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before: dict[str, Any] = json.loads(note.read_text())
        if before["files"] == state and digest in (None, before["digest"]):
            return str(before["digest"])
    found = folder_digest(folder, weights=weights, progress=progress)
    if digest is not None and found != digest:
        raise ModelLoadError(
            f"the model at {folder} is not the one asked for: its digest is {found}, not {digest}; "
            "remove the folder and fetch it again, or correct the digest"
        )
    # A volume may be mounted for reading only: then each start reads it whole.
    with contextlib.suppress(OSError):
        note.write_text(json.dumps({"digest": found, "files": state}))
    return found


@contextlib.contextmanager
def _alone(destination: Path) -> Iterator[None]:
    lock = os.open(
        destination.with_name(f".{destination.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _from_hub(name: str, fresh: Path, revision: str | None, *, weights: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignore = None if weights else [f"*{suffix}" for suffix in WEIGHTS]
    try:
        snapshot_download(name, revision=revision, local_dir=fresh, ignore_patterns=ignore)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"cannot fetch {name} from the hub: {reason}") from error
    shutil.rmtree(fresh / ".cache", ignore_errors=True)


def _from_url(url: str, fresh: Path, *, weights: bool, progress: Progress | None) -> None:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ValueError, ImportError) as error:
        raise UsageError(f"cannot read '{url}': {error}") from error
    try:
        names = sorted(str(name) for name in system.find(root))
        for name in names:
            relative = name.removeprefix(str(root)).lstrip("/")
            # No name may lead out of the folder, and hidden files are not part of a model.
            if any(part.startswith(".") for part in Path(relative).parts):
                continue
            if not weights and Path(relative).suffix in WEIGHTS:
                continue
            target = fresh / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with system.open(name, "rb") as reading, target.open("wb") as writing:
                while chunk := reading.read(_CHUNK_BYTES):
                    writing.write(chunk)
                    if progress is not None:
                        progress(relative, len(chunk))
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"cannot fetch {url}: {reason}") from error
    if not names:
        raise ModelLoadError(f"there is nothing at {url}")
