"""How this room's clients open channels to a node."""

from __future__ import annotations

import grpc

from penstock import transport
from penstock.allocator import keep_freed_memory
from penstock.peers import ALONE, Peers

MAX_MESSAGE_BYTES = 8 << 20


def open_channel(address: str, peers: Peers = ALONE) -> grpc.aio.Channel:
    """A channel with a connection of its own, quick to find a node that has restarted."""
    keep_freed_memory()
    return transport.open_channel(
        peers,
        address,
        [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.max_pings_without_data", 0),
        ],
    )
