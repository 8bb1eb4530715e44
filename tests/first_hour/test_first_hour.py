"""The parts of `hour.py`, with the penstock that is installed beside this Python and the local
launcher. `python tests/first_hour/hour.py --install DIR` also installs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.first_hour import hour as first
from tests.kvstore.redis_server import running_redis


@dataclass
class Desk:
    hour: first.Hour
    url: str
    redis: Any


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> first.Hour:
    penstock = Path(sys.executable).with_name("penstock")
    return first.Hour(tmp_path_factory.mktemp("desk"), str(penstock))


@pytest.fixture(scope="module")
def desk(hour: first.Hour) -> Iterator[Desk]:
    with running_redis() as redis, first.cluster(hour, redis) as url:
        yield Desk(hour, url, redis)


def test_version_help_and_doctor(hour: first.Hour) -> None:
    first.look_around(hour)


def test_a_wrong_flag_is_named_with_the_right_one(hour: first.Hour) -> None:
    first.wrong_flag(hour)


def test_a_wrong_path_is_named_with_what_to_do(hour: first.Hour) -> None:
    first.wrong_path(hour)


def test_a_document_is_asked_twice_and_read_once(desk: Desk) -> None:
    first.ask(desk.hour, desk.url)


def test_what_is_too_long_says_by_how_much(desk: Desk) -> None:
    first.too_long(desk.hour, desk.url)


def test_a_busy_port_is_named_with_who_holds_it(desk: Desk) -> None:
    first.busy_port(desk.hour, desk.url)


def test_a_killed_redis_changes_no_answer_and_is_named(desk: Desk) -> None:
    first.killed_redis(desk.hour, desk.url, desk.redis)


def test_the_judge_is_strict() -> None:
    """What `names` must not let pass."""
    good = "penstock: no model at 'x'; name a folder\n"
    first.Said(1, "", good).names("'x'", "folder", code=1)
    for said in (
        first.Said(0, "", good),
        first.Said(1, "", "Traceback (most recent call last):\n" + good),
        first.Said(1, "", good + good),
        first.Said(1, "", ""),
        first.Said(1, "", "penstock: no model\n"),
    ):
        with pytest.raises(AssertionError):
            said.names("'x'", code=1)
