"""Epochs grow over restarts, whatever the wall clock and the file of the last one say."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.config import StoreConfig
from kvstore.epoch import next_epoch
from kvstore.server import start_server


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=2**42), min_size=2, max_size=6))
def test_epochs_grow_while_the_clock_jumps(clock_ms: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        epochs = [next_epoch(Path(folder), now_ms=now_ms) for now_ms in clock_ms]
    assert all(late > early for early, late in pairwise(epochs))
    assert all(epoch >= now_ms for epoch, now_ms in zip(epochs, clock_ms, strict=True))


@pytest.mark.parametrize("text", [b"", b"x", b"-5", b"9" * 4000, b"\xff\x00", b"1 2"])
def test_a_broken_file_leaves_it_to_the_clock(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "epoch").write_bytes(text)
    assert [next_epoch(tmp_path, now_ms=50), next_epoch(tmp_path, now_ms=50)] == [50, 51]


def test_without_a_usable_folder_the_clock_decides(tmp_path: Path) -> None:
    assert next_epoch(None, now_ms=5) == 5
    (tmp_path / "file").write_bytes(b"")
    assert next_epoch(tmp_path / "file", now_ms=5) == 5


async def test_a_node_goes_on_from_the_epoch_in_its_folder(tmp_path: Path) -> None:
    ahead = 10**15
    (tmp_path / "epoch").write_text(f"{ahead}\n")
    config = StoreConfig(
        memory_bytes=1 << 20, disk_bytes=1 << 28, disk_dir=str(tmp_path), node_id="node-1"
    )
    for life in (1, 2):
        server = await start_server(config)
        try:
            assert server.node.epoch == ahead + life
        finally:
            await server.stop(0.1)
