"""CPU time from /proc: parsing, ancestry, and which process is which part."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.front_case import is_loopback
from bench.procs import Process, all_processes, cpu_by, descendants, parse_stat, part_of


def test_stat_of_a_name_with_spaces_and_parentheses() -> None:
    fields = ["S", "7", *["0"] * 9, "250", "50", *["0"] * 8, "3", "0"]
    parent, cpu_s, resident = parse_stat("42 (a) b (c)) " + " ".join(fields))
    assert parent == 7
    assert cpu_s == pytest.approx(300 / os.sysconf("SC_CLK_TCK"))
    assert resident == 3 * os.sysconf("SC_PAGE_SIZE")


def test_descendants_are_found_through_generations_and_never_the_root() -> None:
    tree = [Process(pid, parent, 0.0, 0, "") for pid, parent in ((2, 1), (3, 2), (4, 3), (9, 8))]
    assert {p.pid for p in descendants(tree, 2)} == {3, 4}


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("python -m cluster.front", "front"),
        ("python -m decode --spec-stdin", "decode"),
        ("python -m prefill --spec-stdin", "prefill"),
        ("python -m kvstore --config-stdin", "store"),
        ("ray::ServeReplica:front:front", "front"),
        ("ray::ServeReplica:decode:decode.hold", "decode"),
        ("ray::ProxyActor.run", "proxy"),
        ("lib/haproxy -f some.cfg", "proxy"),
        ("ray::ServeController", "rest"),
        ("python -m decoder", "rest"),
        ("", "rest"),
    ],
)
def test_parts(command: str, part: str) -> None:
    assert part_of(command) == part


def test_cpu_that_a_child_burns_is_seen() -> None:
    code = "import os\nwhile sum(os.times()[:2]) < 0.3: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdin and child.stdout
        child.stdout.readline()
        assert child.pid in {p.pid for p in all_processes()}
        seen = cpu_by(lambda command: "child" if "input()" in command else "other")
        assert seen["child"] >= 0.25
    finally:
        child.communicate(b"\n", timeout=10)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("0100007F", True),
        ("0201007F", True),
        ("00000000", False),
        ("0000000000000000FFFF00000100007F", True),
        ("00000000000000000000000001000000", True),
        ("0" * 32, False),
        ("7F00000A", False),
    ],
)
def test_loopback_as_the_kernel_writes_it(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
