"""Extents and their log: what was written is read again, whatever happened to the files between."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.disk.files import DiskFiles
from kvstore.disk.log import RECORD_BYTES, CatalogLog, Place, read_log
from penstock.blocks import ObjectKind
from penstock.errors import UsageError

SIZE_BYTES, EXTENT_BYTES, LIVE_BYTES = 4000, 500, 2400
IDS = [bytes([number]) * 32 for number in range(12)]


def place_of(id_: bytes, data: bytes, *, kind: ObjectKind = ObjectKind.BLOCK) -> Place:
    return Place(id_, kind, bytes(32), 256, blake3(data).digest(), 0, 0, len(data))


def opened(folder: Path) -> DiskFiles:
    return DiskFiles(folder, size_bytes=SIZE_BYTES, extent_bytes=EXTENT_BYTES)


class FilesMachine(RuleBasedStateMachine):
    """Beside the files runs a dict. A crash is played on a copy of the folder as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="penstock-disk-"))
        self.folder = self.root / "0"
        self.starts = 0
        self.files = opened(self.folder)
        self.model: dict[bytes, bytes] = {}

    @rule(id_=st.sampled_from(IDS), size=st.integers(1, EXTENT_BYTES), fill=st.integers(0, 255))
    def write(self, id_: bytes, size: int, fill: int) -> None:
        others = sum(len(data) for other, data in self.model.items() if other != id_)
        # The catalogue above keeps to this share; without it there would be nothing to compact.
        if others + len(self.model.get(id_, b"")) + size > LIVE_BYTES:
            return
        data = bytes([fill]) * size
        placed = self.files.write(place_of(id_, data), memoryview(data))
        assert placed.size_bytes == size
        self.model[id_] = data

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=4, unique=True))
    def drop(self, ids: list[bytes]) -> None:
        self.files.drop(ids)
        for id_ in ids:
            self.model.pop(id_, None)

    @rule()
    def restart(self) -> None:
        self.files.sync()
        self.files.close()
        self.files = opened(self.folder)
        assert self.files.damaged == 0

    @rule(torn=st.integers(0, RECORD_BYTES - 1))
    def crash(self, torn: int) -> None:
        """The process is gone in the middle of a record; nothing was closed or flushed."""
        self.starts += 1
        copy = self.root / str(self.starts)
        shutil.copytree(self.folder, copy)
        with (copy / "catalog.log").open("ab") as log:
            log.write(b"\x7f" * torn)
        self.files.close()
        self.folder = copy
        self.files = opened(copy)
        assert self.files.damaged == (1 if torn else 0)

    @invariant()
    def everything_is_there_and_within_its_size(self) -> None:
        assert set(self.files.places) == set(self.model)
        for id_ in IDS:
            read = self.files.read(id_)
            assert (None if read is None else bytes(read)) == self.model.get(id_)
        on_disk = sum(path.stat().st_size for path in self.folder.glob("extent-*.kv"))
        assert self.files.file_bytes == on_disk <= SIZE_BYTES + EXTENT_BYTES

    def teardown(self) -> None:
        self.files.close()
        shutil.rmtree(self.root)


TestFiles = FilesMachine.TestCase
TestFiles.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def written(folder: Path, count: int = 6) -> dict[bytes, bytes]:
    files = opened(folder)
    contents = {id_: bytes([number]) * 100 for number, id_ in enumerate(IDS[:count])}
    for id_, data in contents.items():
        files.write(place_of(id_, data), memoryview(data))
    files.sync()
    files.close()
    return contents


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_the_log_no_wrong_place_is_read(data: st.DataObject) -> None:
    places = [
        Place(id_, ObjectKind.STATE, bytes(32), number, bytes([number]) * 32, number, 7, number + 1)
        for number, id_ in enumerate(IDS[:5])
    ]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "catalog.log"
        log = CatalogLog(path, records=0)
        for place in places:
            log.put(place)
        log.close()
        raw = bytearray(path.read_bytes())
        cut = data.draw(st.integers(0, len(raw)))
        flips = data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 7))))
        for byte, bit in flips:
            raw[byte] ^= 1 << bit
        path.write_bytes(raw[:cut])
        contents = read_log(path)
        for id_, place in contents.places.items():
            assert place in places and place.id == id_
        hurt = {byte // RECORD_BYTES for byte, _ in flips}
        whole = [place for number, place in enumerate(places) if (number + 1) * RECORD_BYTES <= cut]
        spared = [place for place in whole if places.index(place) not in hurt]
        assert all(contents.places[place.id] == place for place in spared)


def test_two_nodes_never_share_a_folder(folder: Path) -> None:
    files = opened(folder)
    with pytest.raises(UsageError, match="another store node uses"):
        opened(folder)
    files.close()
    opened(folder).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot use .*file"):
        opened(tmp_path / "file" / "kv")


def test_only_the_owner_can_read_what_prompts_became(folder: Path) -> None:
    written(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_extent_that_is_gone_or_short_takes_only_its_objects(folder: Path) -> None:
    contents = written(folder)
    first, second = sorted(folder.glob("extent-*.kv"))[:2]
    first.unlink()
    os.truncate(second, 50)
    files = opened(folder)
    assert files.places == {}
    data = b"again" * 20
    files.write(place_of(IDS[0], data), memoryview(data))
    files.close()
    files = opened(folder)
    assert bytes(files.read(IDS[0]) or b"") == data, "a lost extent's number is not used again"
    assert set(files.places) == {IDS[0]} and len(contents) == 6
    files.close()


def test_a_full_disk_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = written(folder)
    files = opened(folder)
    real = os.write

    def half(fd: int, data: bytes | memoryview) -> int:
        real(fd, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    data = b"x" * 100
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            files.write(place_of(IDS[9], data), memoryview(data))
    monkeypatch.setattr(os, "write", real)
    files.write(place_of(IDS[9], data), memoryview(data))
    files.close()
    files = opened(folder)
    assert {id_: bytes(files.read(id_) or b"") for id_ in files.places} == contents | {IDS[9]: data}
    assert files.damaged == 0
    files.close()


def test_the_log_is_rewritten_before_it_outgrows_its_objects(folder: Path) -> None:
    files = opened(folder)
    data = b"x" * 10
    for _ in range(5000):
        files.write(place_of(IDS[0], data), memoryview(data))
        files.drop([IDS[0]])
    files.write(place_of(IDS[1], data), memoryview(data))
    assert (folder / "catalog.log").stat().st_size < 9000 * RECORD_BYTES
    files.close()
    files = opened(folder)
    assert set(files.places) == {IDS[1]}
    files.close()
