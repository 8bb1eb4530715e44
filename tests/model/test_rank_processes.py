"""A replica of real processes: the engine contract over it, and what happens when one is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import DraftRequest, Engine, Segment
from model.open import open_engine
from model.ranks.engine import RankedEngine
from model.ranks.followers import ChildRank, Followers, Order, RankProcess
from model.ranks.handshake import Door, knock
from model.ranks.message import Channel, Pack, unpack
from penstock.errors import ModelLoadError, PenstockError, WorkerUnavailableError
from penstock.request import Sampling
from penstock.worker import ModelSpec, RankSpec
from tests.model import engine_contract, oracle

Models = Callable[[str], oracle.OracleModel]
TWO = RankSpec(tensor=2, timeout_s=20)


class Watched:
    """Starts child ranks and keeps them for the test."""

    def __init__(self) -> None:
        self.started: list[ChildRank] = []

    def __call__(self, order: Order) -> RankProcess:
        self.started.append(ChildRank(order))
        return self.started[-1]

    def pid(self, at: int = 0) -> int:
        pid = self.started[at].pid
        assert pid is not None
        return pid


@pytest.fixture(scope="module")
def fakes() -> Iterator[engine_contract.Factory]:
    yield from _two_replicas(ModelSpec(model="fake", num_speculative_tokens=4))


@pytest.fixture(scope="module")
def models(model: Models) -> Iterator[engine_contract.Factory]:
    yield from _two_replicas(ModelSpec(model=str(model("all_kinds").folder)))


def _two_replicas(spec: ModelSpec) -> Iterator[engine_contract.Factory]:
    """Handed out in turn."""
    opened: list[Engine] = [open_engine(spec, TWO) for _ in range(2)]
    turn = itertools.cycle(opened)
    yield lambda: next(turn)
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda clause: clause.__name__)
def test_a_replica_of_fakes_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None], fakes: engine_contract.Factory
) -> None:
    clause(fakes)


@pytest.mark.parametrize(
    "clause",
    [
        engine_contract.companions_change_nothing,
        engine_contract.a_restored_sequence_goes_on_alike,
        engine_contract.misuse_is_a_value_error,
        engine_contract.every_position_s_logits_are_those_of_its_prefix,
        engine_contract.seek_outside_the_last_seekable_forward_is_refused,
    ],
    ids=lambda clause: clause.__name__,
)
def test_a_replica_of_models_keeps_the_contract(
    clause: Callable[[engine_contract.Factory], None], models: engine_contract.Factory
) -> None:
    """Blocks and states loaded into it reach every rank, or the next sums would be others."""
    clause(models)


def test_four_processes_compute_what_four_threads_do(model: Models) -> None:
    """gloo adds in rank order too: the transport changes no bit."""
    from tests.model.ranked import ranks, rows_and_snapshot

    source = model("pro_like")
    tokens = source.tokens(200)
    work = rows_and_snapshot(tokens, [77, 200])
    exact = {"kv_cache_dtype": "fp32", "dtype": "float32"}
    with ranks(source.folder, tp=2, ep=2, **exact) as several:
        wanted = several.each(work)[0]
    spec = ModelSpec(model=str(source.folder), **exact)
    engine = open_engine(spec, RankSpec(tensor=2, expert=2, timeout_s=20))
    try:
        got = work(engine)
    finally:
        engine.close()
    assert got[1] == wanted[1]
    assert (got[0] == wanted[0]).all()
    assert got[2] == wanted[2]


@pytest.mark.parametrize("kind", ["fake", "torch"])
def test_a_killed_follower_ends_the_replica_at_once(kind: str, model: Models) -> None:
    watched = Watched()
    name = "fake" if kind == "fake" else str(model("all_kinds").folder)
    engine = open_engine(ModelSpec(model=name), RankSpec(tensor=2, timeout_s=20), start=watched)
    sequence = engine_contract.absorb(engine, [1, 2, 3], chunk=3, capacity=50)
    engine.check()
    os.kill(watched.pid(), signal.SIGKILL)
    started = time.monotonic()
    if kind == "fake":
        while time.monotonic() - started < 5:
            try:
                engine.check()
            except WorkerUnavailableError:
                break
    with pytest.raises(WorkerUnavailableError, match=r"rank 1 of 2 has ended \(status -9\)"):
        engine.forward([Segment(sequence, [1] * 40)])
    took = time.monotonic() - started
    print(f"{kind}: known after {took:.2f} s")
    assert took < 5
    with pytest.raises(WorkerUnavailableError, match="rank 1"):
        engine.check()
    with pytest.raises(WorkerUnavailableError, match="rank 1"):
        engine.open(10)
    engine.release(sequence)
    engine.close()
    engine.close()


def test_a_follower_that_stops_answering_is_given_up_after_the_timeout(model: Models) -> None:
    watched = Watched()
    spec = ModelSpec(model=str(model("heavy_last").folder))
    engine = open_engine(spec, RankSpec(tensor=2, timeout_s=2), start=watched)
    sequence = engine.open(50)
    os.kill(watched.pid(), signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(WorkerUnavailableError, match="replaced"):
        engine.forward([Segment(sequence, [1] * 40)])
    took = time.monotonic() - started
    print(f"given up after {took:.1f} s of a timeout of 2 s")
    assert took < 10
    # It was ended, stopped or not.
    assert watched.started[0].ended() is not None
    engine.close()


_LEADER = """
import sys, json
from model.engine import Segment
from model.open import open_engine
from penstock.worker import ModelSpec, RankSpec
from tests.model.test_rank_processes import Watched
if __name__ == "__main__":
    watched = Watched()
    engine = open_engine(ModelSpec(model=sys.argv[1]), RankSpec(expert=2), start=watched)
    print(json.dumps([watched.pid()]), flush=True)
    sequence = engine.open(100_000)
    while True:
        engine.forward([Segment(sequence, [1])])
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_followers_go_with_their_leader(name: str, model: Models) -> None:
    """Killed in the middle of steps: the follower is inside a call or waits for one."""
    command = [sys.executable, "-c", _LEADER, str(model("heavy_last").folder)]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    (follower,) = json.loads(leader.stdout.readline())
    time.sleep(0.3)
    leader.send_signal(getattr(signal, name))
    leader.wait(10)
    started = time.monotonic()
    while _runs(follower):
        assert time.monotonic() - started < 5, "the follower lives on"
        time.sleep(0.02)
    print(f"{name}: follower gone {time.monotonic() - started:.2f} s after its leader")
    leader.stdout.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_follower_that_cannot_load_names_the_reason(model: Models) -> None:
    class Elsewhere(Watched):
        def __call__(self, order: Order) -> RankProcess:
            broken = order.model.model_copy(update={"model": "/no/such/folder"})
            return super().__call__(order.model_copy(update={"model": broken}))

    watched = Elsewhere()
    spec = ModelSpec(model=str(model("heavy_last").folder))
    # With nothing to meet for, the follower's own answer is what decides.
    with pytest.raises(PenstockError, match=r"rank 1.*/no/such/folder"):
        open_engine(spec, RankSpec(tensor=2, timeout_s=5), start=watched)
    assert watched.started[0].ended() is not None


def test_a_rank_that_computes_other_numbers_is_refused(model: Models) -> None:
    class Other(Watched):
        def __call__(self, order: Order) -> RankProcess:
            other = order.model.model_copy(update={"kv_cache_dtype": "fp32"})
            return super().__call__(order.model_copy(update={"model": other}))

    with pytest.raises(ModelLoadError, match="rank 1 computes other numbers"):
        open_engine(ModelSpec(model=str(model("heavy_last").folder)), TWO, start=Other())


def test_ranks_that_do_not_fit_are_refused_before_one_is_started(model: Models) -> None:
    watched = Watched()
    spec = ModelSpec(model=str(model("heavy_last").folder))
    with pytest.raises(ModelLoadError, match="4 heads"):
        open_engine(spec, RankSpec(tensor=3), start=watched)
    assert watched.started == []


def test_only_who_knows_the_token_is_let_in() -> None:
    door = Door("127.0.0.1")
    told: list[Exception] = []

    def guests() -> None:
        if told:
            return
        try:
            knock("127.0.0.1", door.port, token="00" * 32, rank=1)
        except (OSError, EOFError) as error:
            told.append(error)

    import threading

    intruder = threading.Thread(target=guests)
    garbage = socket.create_connection(("127.0.0.1", door.port))
    garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\0" * 64)
    deep = socket.create_connection(("127.0.0.1", door.port))
    nested = b"[" * 2000 + b"]" * 2000
    deep.sendall(struct.pack(">II", len(nested), 0) + nested)
    intruder.start()
    found: list[Channel] = []
    friend = threading.Thread(
        target=lambda: (
            intruder.join(),
            found.append(knock("127.0.0.1", door.port, token=door.token, rank=1)),
        )
    )
    friend.start()
    admitted = door.admit({1}, timeout_s=20, alive=lambda: None)
    friend.join()
    assert len(told) == 1
    admitted[1].send({"call": "x"}, [b"abc", memoryview(b"de")])
    head, data = found[0].receive()
    assert (head, bytes(data)) == ({"call": "x"}, b"abcde")
    for channel in (*found, *admitted.values()):
        channel.close()
    garbage.close()
    door.close()


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.frozensets(st.integers(0, 9))
    | st.lists(st.integers(-(2**62), 2**62), min_size=17, max_size=40).map(tuple),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=10,
)


@given(st.lists(_PLAIN, max_size=5))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_plain_arguments_arrive_as_they_were(values: list[object]) -> None:
    pack = Pack(lambda value: None)
    head = json.loads(json.dumps([pack.value(value) for value in values]))
    data = memoryview(b"".join(pack.buffers))
    got = [_plain(unpack(value, data, {})) for value in head]
    assert got == values


def _plain(value: object) -> object:
    if isinstance(value, memoryview):
        return bytes(value)
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


def test_sequences_and_records_arrive_and_nothing_else_travels() -> None:
    mine, theirs = object(), object()
    pack = Pack(lambda value: 7 if value is mine else None)
    sampling = Sampling(temperature=0.5, seed=3)
    sent = [
        Segment(mine, list(range(100)), (5, 9), all_logits=True),  # type: ignore[arg-type]
        DraftRequest(mine, 4, 2, sampling, frozenset({1, 2})),  # type: ignore[arg-type]
    ]
    head = json.loads(json.dumps(pack.value(sent)))
    segment, request = unpack(head, memoryview(b"".join(pack.buffers)), {7: theirs})
    assert segment == Segment(theirs, tuple(range(100)), (5, 9), all_logits=True)  # type: ignore[arg-type]
    assert request == DraftRequest(theirs, 4, 2, sampling, frozenset({1, 2}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot travel"):
        pack.value(object())


def test_a_follower_makes_engine_calls_only() -> None:
    """A message that asks for anything else ends the follower, and with it the replica."""
    watched = Watched()
    spec = ModelSpec(model="fake")
    followers = Followers(spec, TWO, host="127.0.0.1", start=watched)
    followers.await_ready()
    followers.tell({"call": "__init__", "arguments": [], "number": None, "together": True})
    started = time.monotonic()
    while watched.started[0].ended() is None:
        assert time.monotonic() - started < 10
        time.sleep(0.02)
    assert "no engine call" in str(watched.started[0].ended())
    followers.close()


class Idle:
    """A rank that comes in and then never loads its part."""

    def __init__(self, order: Order) -> None:
        self._order = order
        threading.Thread(target=self._come_in, daemon=True).start()

    def _come_in(self) -> None:
        o = self._order
        self._channel = knock(o.host, o.port, token=o.token, rank=o.rank)

    def ended(self) -> str | None:
        return None

    def stop(self) -> None:
        self._channel.close()


def test_rank_that_never_loads_is_named_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.ranks.followers._LOAD_TIMEOUT_S", 0.3)
    followers = Followers(ModelSpec(model="fake"), TWO, host="127.0.0.1", start=Idle)
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="rank 1 did not load its part within"):
        followers.await_ready()
    assert time.monotonic() - started < 10
    followers.close()


def test_calls_are_refused_alike_and_the_replica_lives_on() -> None:
    engine = open_engine(ModelSpec(model="fake"), TWO)
    assert isinstance(engine, RankedEngine)
    sequence = engine.open(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="capacity"):
            engine.forward([Segment(sequence, [1] * 11)])
    engine.forward([Segment(sequence, [1] * 10)])
    engine.release(sequence)
    with pytest.raises(ValueError, match="released"):
        engine.forward([Segment(sequence, [1])])
    engine.check()
    engine.close()
