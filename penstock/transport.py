"""Opens every channel and every port between front, workers and store node, as `Peers` says."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import grpc

from penstock.errors import ClusterAuthError
from penstock.peers import PEER_NAME, TOKEN_KEY, Peers
from penstock.telemetry import logs, trace

# What a probe may ask without the token: it tells whether a part serves, nothing of its contents.
_OPEN = "/grpc.health.v1.Health/"

Options = Sequence[tuple[str, int | str]]


def open_channel(peers: Peers, address: str, options: Options) -> grpc.aio.Channel:
    """A channel to a member of the cluster. Raises `UsageError` for unreadable files."""
    if peers.secure:
        ca, cert, key = peers.files()
        channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca, key, cert),
            options=[*options, ("grpc.ssl_target_name_override", PEER_NAME)],
        )
    else:
        channel = grpc.aio.insecure_channel(address, options=list(options))
    return _SignedChannel(channel, peers.token())


def gates(peers: Peers) -> list[grpc.aio.ServerInterceptor]:
    """Interceptors of a server inside the cluster: they refuse calls without the token."""
    token = peers.token()
    return [] if token is None else [_TokenGate(token)]


def bind(peers: Peers, server: Any, address: str) -> int:
    """The port. Raises RuntimeError if the address cannot be bound, `UsageError` for files."""
    if not peers.secure:
        return int(server.add_insecure_port(address))
    ca, cert, key = peers.files()
    credentials = grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=ca, require_client_auth=True
    )
    return int(server.add_secure_port(address, credentials))


class _TokenGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Every call but health checks must carry the token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        if handler_call_details.method.startswith(_OPEN) or self._knows(handler_call_details):
            return await continuation(handler_call_details)
        # Of this kind whatever the method's own: it ends the call without waiting for a message.
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _knows(self, details: Any) -> bool:
        for key, value in details.invocation_metadata or ():
            if key == TOKEN_KEY:
                raw = value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
                return hmac.compare_digest(raw, self._token)
        return False


async def _refuse(_: Any, context: Any) -> None:
    error = ClusterAuthError(
        "this call carries no or another cluster token; give every process of the cluster the same "
        "PENSTOCK_TLS__CLUSTER_TOKEN or PENSTOCK_TLS__CLUSTER_TOKEN_FILE"
    )
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        error.message,
        trailing_metadata=(("penstock-code", error.code),),
    )


class _SignedChannel(grpc.aio.Channel):  # type: ignore[misc]
    """A channel whose every call carries the token, and the request and trace it is made for.

    Not a client interceptor: those put a queue between a stream's writer and the wire.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str | None) -> None:
        self._channel = channel
        self._extra = () if token is None else ((TOKEN_KEY, token),)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._signed(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._signed(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._signed(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._signed(self._channel.stream_stream(*args, **kwargs))

    def _signed(self, method: Any) -> Any:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            metadata = (*(metadata or ()), *self._extra, *logs.outgoing(), *trace.outgoing())
            return method(*args, metadata=metadata, **kwargs)

        return call

    async def __aenter__(self) -> Self:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *exit_: Any) -> None:
        await self._channel.__aexit__(*exit_)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: Any) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()
