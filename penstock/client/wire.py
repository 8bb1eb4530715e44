"""The connection: channel, errors, and which of them are worth another try."""

from __future__ import annotations

import random
import time
from pathlib import Path

import grpc

from penstock.errors import (
    AuthenticationError,
    ConflictError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PenstockError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
    from_code,
)

MAX_MESSAGE_BYTES = 32 << 20
_CODE_KEY, _RETRY_KEY, _PARAM_KEY = "penstock-code", "retry-after-ms", "penstock-param"
# What gRPC itself says when a server dies or a connection breaks; never said by our service alone.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
_KINDS: dict[grpc.StatusCode, type[PenstockError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0


def open_channel(target: str, *, ca: str | Path | None, tls: bool) -> grpc.aio.Channel:
    """Raises UsageError for a certificate that cannot be read."""
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A server that vanished without a word is noticed within 15 s.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if not (tls or ca is not None):
        return grpc.aio.insecure_channel(target, options=options)
    try:
        roots = None if ca is None else Path(ca).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the certificate {ca}: {error.strerror}") from error
    credentials = grpc.ssl_channel_credentials(roots)
    return grpc.aio.secure_channel(target, credentials, options=options)


def error_of(error: grpc.aio.AioRpcError, target: str) -> PenstockError:
    """The error tree's word for a failed call."""
    metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    message = error.details() or ""
    if _CODE_KEY in metadata:
        retry = metadata.get(_RETRY_KEY, "")
        code, param = metadata[_CODE_KEY], metadata.get(_PARAM_KEY)
        retry_after_s = int(retry) / 1e3 if retry.isdigit() else None
        known = from_code(code, message, param=param, retry_after_s=retry_after_s)
        kind = _KINDS.get(error.code())
        if type(known) is PenstockError and kind is not None:
            # A code of finer grain than the tree: its status says what kind of error it is.
            return kind(message, code=code, param=param, retry_after_s=retry_after_s)
        return known
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"the batch service at {target} did not answer in time")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return UsageError(
            f"{target} is no batch service; name the --grpc-port of `penstock serve`, not --port"
        )
    if error.code() in _BROKEN:
        return UnavailableError(
            f"the batch service at {target} cannot be reached ({error.code().name}); is "
            "`penstock serve --grpc-port` running there?"
        )
    return PenstockError(f"the batch service at {target} failed: {error.code().name} {message}")


class Patience:
    """How long failures in a row are borne. `worked` after every success starts it anew."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._since: float | None = None
        self._tries = 0

    def worked(self) -> None:
        self._since, self._tries = None, 0

    def pause_s(self, error: PenstockError) -> float:
        """Seconds to wait before the next try. Raises `error` if there is to be none."""
        if not isinstance(error, UnavailableError | OverloadedError | DeadlineError):
            raise error
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._retry_s:
            raise error
        self._tries += 1
        longest = min(_FIRST_PAUSE_S * 2.0**self._tries, _LONGEST_PAUSE_S)
        return max(random.uniform(longest / 2, longest), min(error.retry_after_s or 0.0, 30.0))
