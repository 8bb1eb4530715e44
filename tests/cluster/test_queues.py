"""Every queue of the code stands in docs/limits.md with its bound."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cluster.queues import QUEUES, table

ROOT = Path(__file__).parents[2]
MAKERS = {"Queue", "LifoQueue", "PriorityQueue", "SimpleQueue", "deque"}
ROOMS = ("bench", "cluster", "decode", "kernels", "kvstore", "model", "penstock", "prefill")


def _maker(node: ast.AST) -> bool:
    """Whether it makes a queue, or names a class that will (`default_factory=deque`)."""
    named = node.func if isinstance(node, ast.Call) else node
    named = named.value if isinstance(named, ast.Subscript) else named
    if isinstance(node, ast.Call | ast.Name | ast.Attribute):
        name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", "")
        return name in MAKERS
    return False


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "?")


def made_in(source: str, path: str) -> Iterator[str]:
    """FILE:NAME of each queue that this source makes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            calls = (each for each in ast.walk(node.value) if isinstance(each, ast.Call))
            factories = (
                keyword.value
                for call in ast.walk(node.value)
                if isinstance(call, ast.Call)
                for keyword in call.keywords
                if keyword.arg == "default_factory"
            )
            if any(map(_maker, calls)) or any(map(_maker, factories)):
                yield f"{path}:{_target(node)}"


def every_queue() -> set[str]:
    names = subprocess.run(
        ["git", "ls-files", *(f"{room}/*.py" for room in ROOMS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found: set[str] = set()
    for name in names:
        text = (ROOT / name).read_text()
        if any(maker in text for maker in MAKERS):
            found.update(made_in(text, name))
    return found


def test_every_queue_has_a_bound_in_the_table() -> None:
    found = every_queue()
    listed = {line.where for line in QUEUES if not line.by_hand}
    assert len(found) > 10
    assert found - listed == set(), "give each of these a bound in cluster/queues.py"
    assert listed - found == set(), "these are gone; take them out of cluster/queues.py"


def test_queues_that_are_listed_by_hand_exist() -> None:
    for line in QUEUES:
        path, _, name = line.where.partition(":")
        assert name in (ROOT / path).read_text(), line.where
        assert line.what and line.bound and line.when_full


def test_the_table_is_in_the_page() -> None:
    assert table() in (ROOT / "docs" / "limits.md").read_text()


def test_the_finder_finds() -> None:
    source = (
        "class A:\n"
        "    one: deque[int] = field(default_factory=deque)\n"
        "    def __init__(self) -> None:\n"
        "        self.two = asyncio.Queue(3)\n"
        "        self.three: collections.deque[int] = collections.deque(maxlen=2)\n"
        "        four = queue.SimpleQueue[int]()\n"
        "        five = list[int]()\n"
    )
    assert list(made_in(source, "x.py")) == ["x.py:one", "x.py:two", "x.py:three", "x.py:four"]
