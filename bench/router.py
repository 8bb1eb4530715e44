"""Routing decisions a second on one core: look up what is resident, choose, charge.

The fleet is busy and unequal, so that every term of a cost counts; every decision is charged, and
the oldest is released, as requests come and go. Prompts draw on what is resident the way a
conversation service does: half go on with a prefix that is there, half are new.

Rates are of processor time, so that a machine's other work does not count as ours; what the clock
on the wall says stands beside them.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import deque
from dataclasses import dataclass

from bench.report import Report, Row
from bench.stats import low_median_high
from cluster.contracts import WorkerView
from cluster.policy import DECODE, PREFILL, Coefficients, RoutingPolicy, Shape
from cluster.routing.board import Board
from cluster.routing.charge import Charged
from cluster.routing.choice import open_policy
from cluster.routing.mirror import Came, Mirror
from cluster.routing.routed import WORTH_WAITING_TOKENS, InFlight, Reading
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.identity import Chain, namespace

BLOCK_BYTES, STATE_BYTES = 900_000, 3_640_000
TRUNK_BLOCKS, BRANCH_BLOCKS, BRANCHES = 32, 8, 50
"""A resident prefix is a document that 50 others share, and a conversation of its own about it."""
IN_FLIGHT = 256


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    workers: int = 64
    prefixes: int = 100_000
    decisions: int = 20_000
    repeats: int = 5
    seed: int = 1


@dataclass(frozen=True)
class Prompt:
    """A prompt whose ids are known: hashing is measured apart."""

    blocks: tuple[bytes, ...]
    tokens: tuple[int, ...]

    def state_id(self, position: int) -> bytes:
        return _state(self.blocks[position // BLOCK_TOKENS - 1])


def run(plan: Plan) -> Report:
    began_s = time.perf_counter()
    draw = random.Random(plan.seed)
    filled_s = time.perf_counter()
    mirror, prefixes = _resident(plan, draw)
    filled_s = time.perf_counter() - filled_s
    prompts = _prompts(prefixes, draw)
    rows = [_measured(plan, name, mirror, prompts) for name in RoutingPolicy]
    return Report(
        bench="router",
        settings={
            "workers": plan.workers,
            "prefixes": plan.prefixes,
            "resident_objects": len(mirror),
            "mirror_filled_s": filled_s,
            "prompt_blocks_mean": sum(len(p.blocks) for p in prompts) / len(prompts),
            "repeats": plan.repeats,
        },
        tables={"decisions on one core": rows, "hashing a prompt": _hashing(plan)},
        shows_not=(
            "hashing: it is the second table, and runs in a thread for long prompts",
            "the table of costs of `penstock explain`: it is made only when asked for",
            "how good the decisions are: `penstock simulate` compares the policies",
        ),
        wall_s=time.perf_counter() - began_s,
    )


def _measured(plan: Plan, name: RoutingPolicy, mirror: Mirror, prompts: list[Prompt]) -> Row:
    rates: list[float] = []
    walls: list[float] = []
    for repeat in range(plan.repeats):
        board, policy, flying = _board(plan), open_policy(name), InFlight()
        held: deque[tuple[Charged, Reading | None]] = deque()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for number in range(plan.decisions):
            prompt = prompts[(number + repeat) % len(prompts)]
            shape = Shape(len(prompt.blocks) * BLOCK_TOKENS, 256)
            resident = mirror.resident(prompt)
            near = flying.near(prompt.blocks)
            if near:
                resident = resident.with_near(near)
            decision = policy.choose(board, shape, resident)
            board.turn += 1
            reading = None
            if shape.prompt_tokens - resident.resumable_tokens >= WORTH_WAITING_TOKENS:
                reading = flying.begin(decision.route.prefill.worker_id, prompt.blocks)
            held.append((Charged(board, decision.route, shape, resident), reading))
            if len(held) > IN_FLIGHT:
                charged, read = held.popleft()
                charged.answering()
                charged.close()
                if read is not None:
                    flying.end(read)
        rates.append(plan.decisions / (time.process_time() - began_cpu_s))
        walls.append(plan.decisions / (time.perf_counter() - began_s))
    low, middle, high = low_median_high(rates)
    return {
        "policy": name.value,
        "n": plan.decisions * plan.repeats,
        "decisions_per_s": middle,
        "low": low,
        "high": high,
        "us_each": 1e6 / middle,
        "by_the_clock_per_s": low_median_high(walls)[1],
    }


def _board(plan: Plan) -> Board:
    draw = random.Random(plan.seed)
    views, known = [], {}
    for number in range(plan.workers):
        role = PREFILL if number % 2 else DECODE
        worker_id = f"{role}-{number:04}"
        views.append(
            WorkerView(
                worker_id=worker_id,
                role=role,
                address="",
                pid=0,
                running=draw.randrange(8),
                queued=draw.randrange(4),
                queued_tokens=draw.randrange(200_000),
                capacity_bytes=300 << 30,
                used_bytes=draw.randrange(200 << 30),
                draining=False,
                fingerprint=bytes(32),
                max_model_len=1 << 20,
                bytes_per_token=3514.25,
                metrics={},
            )
        )
        speed = draw.uniform(0.8, 1.2)
        known[worker_id] = Coefficients(
            token_s=speed / 130_000,
            pair_s=speed * 1.9e-11,
            fetch_bytes_per_s=1.3e9 * speed,
            step_s=8.5e-3 * speed,
            sequence_s=8.6e-6,
        )
    board = Board()
    board.show(views, coefficients=known)
    return board


def _resident(plan: Plan, draw: random.Random) -> tuple[Mirror, list[tuple[bytes, ...]]]:
    mirror, prefixes = Mirror(), []
    trunk: tuple[bytes, ...] = ()
    for number in range(plan.prefixes):
        if number % BRANCHES == 0:
            trunk = _blocks(draw, TRUNK_BLOCKS)
            mirror.came("node", _objects(trunk, 0))
        branch = _blocks(draw, BRANCH_BLOCKS)
        blocks = trunk + branch
        mirror.came("node", _objects(blocks, TRUNK_BLOCKS))
        prefixes.append(blocks)
    return mirror, prefixes


def _objects(blocks: tuple[bytes, ...], first: int) -> list[Came]:
    """Blocks from `first` on, and the state at their end."""
    made = [
        Came(
            id_, blocks[i - 1] if i else b"", ObjectKind.BLOCK, (i + 1) * BLOCK_TOKENS, BLOCK_BYTES
        )
        for i, id_ in enumerate(blocks)
        if i >= first
    ]
    end = len(blocks) * BLOCK_TOKENS
    made.append(Came(_state(blocks[-1]), blocks[-1], ObjectKind.STATE, end, STATE_BYTES))
    return made


def _prompts(prefixes: list[tuple[bytes, ...]], draw: random.Random) -> list[Prompt]:
    prompts = []
    for number in range(8_192):
        more = _blocks(draw, draw.randrange(1, 24))
        blocks = draw.choice(prefixes) + more if number % 2 else more
        prompts.append(Prompt(blocks, (0,) * (len(blocks) * BLOCK_TOKENS)))
    return prompts


def _hashing(plan: Plan) -> list[Row]:
    root = Chain.start(bytes(32), namespace(bytes(32), "bench"))
    rows: list[Row] = []
    for tokens in (8_192, 131_072, 1_048_576):
        prompt = tuple(range(tokens))
        taken = []
        for _ in range(plan.repeats):
            began_s = time.perf_counter()
            root.extend(prompt)
            taken.append(time.perf_counter() - began_s)
        low, middle, high = low_median_high(taken)
        rows.append(
            {"tokens": tokens, "n": plan.repeats, "ms": middle * 1e3, "low_ms": low * 1e3,
             "high_ms": high * 1e3}
        )  # fmt: skip
    return rows


def _blocks(draw: random.Random, count: int) -> tuple[bytes, ...]:
    return tuple(draw.randbytes(32) for _ in range(count))


def _state(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=32, person=b"state").digest()
