"""The disk tier killed, refused and cut off power at every system call that changes a file.

A step is one write, sync, creation, renaming or deletion; programs are long enough for compaction
and for a rewritten log. Contents are a function of the id, as in the store.
"""

from __future__ import annotations

import errno
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstore.disk import files as files_module
from kvstore.disk.files import DiskFiles
from kvstore.disk.log import Place
from penstock.blocks import ObjectKind
from tests.chaos.conftest import bounded
from tests.chaos.medium import KilledError, Medium, Switch, path_on, switch

__all__ = ["switch"]

SIZE_BYTES, EXTENT_BYTES, LIVE_BYTES = 1500, 300, 800
IDS = [bytes([number]) * 32 for number in range(10)]
CONTENTS = {id_: random.Random(id_).randbytes(40 + 13 * id_[0]) for id_ in IDS}
Op = tuple[str, int]

OPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "drop", "sync", "reopen"]),
        st.integers(0, len(IDS) - 1),
    ),
    min_size=10,
    max_size=60,
)
FIXED: list[Op] = [
    op
    for turn in range(4)
    for op in (
        *(("write", number) for number in range(turn % 2, 10, 2)),
        ("sync", 0),
        ("drop", 2 + turn),
        ("drop", 4 + turn % 3),
        ("write", 2 + turn),
        ("reopen", 0),
        *(("drop", number) for number in range(turn % 2, 10, 2)),
    )
]


class Life:
    """A folder, a disk tier over it, and what must be there."""

    def __init__(self, root: Path, switch: Switch) -> None:
        self.folder = root / "kv"
        self.switch = switch
        self.there: set[bytes] = set()
        self.maybe: set[bytes] = set()
        """Written or dropped by a call that did not return."""
        self.durable: set[bytes] = set()
        self.files = self.open(Medium())

    def open(self, medium: Medium) -> DiskFiles:
        self.switch.medium = medium
        return DiskFiles(
            path_on(medium, self.folder), size_bytes=SIZE_BYTES, extent_bytes=EXTENT_BYTES
        )

    def run(self, ops: list[Op]) -> None:
        for name, number in ops:
            getattr(self, name)(IDS[number])

    def write(self, id_: bytes) -> None:
        data = CONTENTS[id_]
        live = sum(place.size_bytes for place in self.files.places.values())
        if id_ in self.files.places or live + len(data) > LIVE_BYTES:
            return
        place = Place(id_, ObjectKind.BLOCK, bytes(32), 256, blake3(data).digest(), 0, 0, len(data))
        self.maybe.add(id_)
        try:
            self.files.write(place, memoryview(data))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert id_ not in self.files.places, "refused, and held all the same"
            return
        self.there.add(id_)

    def drop(self, id_: bytes) -> None:
        self.there.discard(id_)
        self.durable.discard(id_)
        self.maybe.add(id_)
        try:
            self.files.drop([id_])
        except OSError as error:
            assert error.errno == errno.ENOSPC

    def sync(self, _: bytes) -> None:
        try:
            self.files.sync()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return
        self.durable = set(self.there)

    def reopen(self, _: bytes) -> None:
        medium = self.switch.medium
        self.files.close()
        self.files = self.open(medium)

    def die(self) -> None:
        """The process has gone: its descriptors close, and nothing else."""
        self.switch.medium.kill()
        self.files.close()

    def check(self, must: set[bytes]) -> None:
        """Everything that must be there is, to the byte; what else is there is right as well."""
        assert must <= set(self.files.places) <= self.there | self.maybe
        for id_ in self.files.places:
            data = self.files.read(id_)
            assert data is not None
            if blake3(data).digest() == self.files.places[id_].digest:
                assert bytes(data) == CONTENTS[id_]
            else:
                assert id_ not in must, "a digest fails: a miss, but of what had to be there"

    def restart(self, must: set[bytes]) -> None:
        self.files = self.open(Medium())
        self.check(must)
        # And it goes on working.
        for id_ in IDS:
            self.write(id_)
        self.check(must)
        self.files.close()


@pytest.fixture(autouse=True)
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_REWRITE_AFTER", 4)


def killed(switch: Switch, ops: list[Op], at: int, torn: float, power: int | None) -> bool:
    """One schedule; False if the program ended before step `at`."""
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as root:
        life = Life(Path(root), switch)
        medium = life.switch.medium
        medium.kill_at, medium.torn = medium.steps + at, torn
        with suppress(KilledError):
            life.run(ops)
        reached = medium.dead
        life.die()
        if power is None:
            life.restart(life.there)
        else:
            medium.cut_power(life.folder, random.Random(power))
            life.restart(life.durable)
    return reached


@pytest.mark.parametrize("power", [None, 1])
def test_a_kill_at_each_step_of_one_long_program(switch: Switch, power: int | None) -> None:
    schedules = 0
    for torn in (0.0, 0.5, 1.0):
        at = 0
        while killed(switch, FIXED, at, torn, None if power is None else at):
            at += 1
        assert at > 100, "the program takes every kind of step many times"
        schedules += at
    print(f"{schedules} schedules")


def test_kills_anywhere(switch: Switch, request: pytest.FixtureRequest) -> None:
    @bounded(request.config, 150)
    @given(
        ops=OPS,
        at=st.integers(0, 120),
        torn=st.floats(0, 1),
        power=st.none() | st.integers(0, 1 << 30),
    )
    def schedule(ops: list[Op], at: int, torn: float, power: int | None) -> None:
        killed(switch, ops, at, torn, power)

    schedule()


def test_a_disk_that_refuses_for_a_while(switch: Switch, request: pytest.FixtureRequest) -> None:
    @bounded(request.config, 150)
    @given(ops=OPS, at=st.integers(0, 100), calls=st.integers(1, 20), torn=st.floats(0, 1))
    def schedule(ops: list[Op], at: int, calls: int, torn: float) -> None:
        with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as root:
            life = Life(Path(root), switch)
            medium = life.switch.medium
            medium.refuse_at = range(medium.steps + at, medium.steps + at + calls)
            medium.torn = torn
            try:
                life.run(ops)
                life.check(life.there)
                medium.refuse_at = range(0)
                life.run(ops)
                life.check(life.there)
            finally:
                medium.refuse_at = range(0)
                life.die()
            life.restart(life.there)

    schedule()


def test_flipped_bits_of_every_file_are_detected(
    switch: Switch, request: pytest.FixtureRequest
) -> None:
    @bounded(request.config, 100)
    @given(ops=OPS, flips=st.lists(st.integers(0, 1 << 30), min_size=1, max_size=4))
    def schedule(ops: list[Op], flips: list[int]) -> None:
        with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as root:
            life = Life(Path(root), switch)
            life.run(ops)
            life.die()
            paths = [path for path in sorted(life.folder.iterdir()) if path.stat().st_size]
            for flip in flips if paths else ():
                rng = random.Random(flip)
                path = rng.choice(paths)
                raw = bytearray(path.read_bytes())
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                path.write_bytes(raw)
            # A lost drop may bring an object back: right, or failing its digest.
            life.maybe |= set(IDS)
            life.restart(set())

    schedule()


def test_an_extent_that_cannot_be_read_does_not_stop_the_compaction(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path / "kv", size_bytes=SIZE_BYTES, extent_bytes=EXTENT_BYTES)
    data = b"x" * 100

    def write(number: int) -> None:
        id_ = bytes([number]) * 32
        place = Place(id_, ObjectKind.BLOCK, bytes(32), 256, blake3(data).digest(), 0, 0, 100)
        files.write(place, memoryview(data))

    for number in range(15):
        write(number)
    files.drop([bytes([number]) * 32 for number in (0, 1, 4, 8)])
    min((tmp_path / "kv").glob("extent-*.kv")).unlink()
    for number in range(20, 23):
        write(number)
    assert bytes([22]) * 32 in files.places
    assert files.read(bytes([2]) * 32) is None, "what lay in the lost file is a miss"
    assert files.unreadable == 1
    files.close()
