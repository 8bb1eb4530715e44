"""What the routes share: one object per app, no globals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.api.bodies import Bodies
from cluster.auth.authenticators import open_authenticator
from cluster.auth.limiter import Limiter
from cluster.auth.metered import MeteredService
from cluster.config import FrontSection
from cluster.contracts import ServedModel, Service
from kvstore.journal.streams import StreamJournal
from penstock.chat import ChatEncoder
from penstock.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from penstock.telemetry import Telemetry, trace
from penstock.telemetry import catalog as M
from penstock.tokenizer import Tokenizer

T = TypeVar("T")
_INLINE_BYTES = 1 << 11


class ApiState:
    """Service, encoders, keys and limits of one app."""

    def __init__(
        self,
        *,
        service: Service,
        tokenizer: Tokenizer | None,
        chat: ChatEncoder | None,
        config: FrontSection,
        telemetry: Telemetry,
        sampling_defaults: Mapping[str, float],
        streams: StreamJournal | None = None,
    ) -> None:
        self.service: Service = MeteredService(service)
        self.config = config
        self.telemetry = telemetry
        telemetry.meters.set(M.REQUESTS_LIMIT, config.max_streams)
        self.sampling_defaults = dict(sampling_defaults)
        self.kept_streams = streams
        """Where streams are kept for clients whose front dies; None: nowhere."""
        self._tokenizer = tokenizer
        self._chat = chat
        self._streams = 0
        self.authenticator = open_authenticator(
            api_keys=config.keys, keys_file=config.api_keys_file
        )
        self.limiter = Limiter()
        self.bodies = Bodies(config)
        # Encoding holds a text, its tokens and their offsets; the threads bound how many at once.
        self._encoders = ThreadPoolExecutor(config.encode_threads, "encode")

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UnavailableError(
                "the served model has no tokenizer.json; send token ids to /v1/completions"
            )
        return self._tokenizer

    @property
    def chat(self) -> ChatEncoder:
        if self._chat is None:
            raise UnavailableError(
                "the served model has no tokenizer.json; send token ids to /v1/completions"
            )
        return self._chat

    def take_stream(self) -> Place:
        """Counts a request in. Raises `OverloadedError` at the limit."""
        place = Place(self)
        place.widen(1)
        return place

    def _take(self, count: int) -> None:
        limit = self.config.max_streams
        if self._streams + count > limit:
            raise OverloadedError(
                f"{self._streams} requests are in progress and this front's limit is {limit}"
            )
        self._streams += count

    @property
    def streams(self) -> int:
        """Answers in progress."""
        return self._streams

    async def model(self, name: str | None = None) -> ServedModel:
        """The served model. Raises `ModelNotFoundError` if `name` is another one."""
        model = await self.service.model()
        if name is not None and name != model.name:
            raise ModelNotFoundError(
                f"the model {name[:100]!a} is not served here; this server has '{model.name}'",
                param="model",
            )
        return model

    async def encode(self, work: Callable[[], T], size_bytes: int) -> T:
        """Runs `work`; in a thread unless the text is short."""
        started = time.monotonic()
        with trace.span("encode", size_bytes=size_bytes):
            if size_bytes <= _INLINE_BYTES:
                result = work()
            else:
                result = await asyncio.get_running_loop().run_in_executor(self._encoders, work)
        self.telemetry.encoded(time.monotonic() - started)
        return result

    def close(self) -> None:
        self.authenticator.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)


class Place:
    """What one request takes of a front's streams. `leave` may be called again."""

    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._taken = 0

    def widen(self, count: int) -> None:
        """Be counted `count` times in all. Raises `OverloadedError` if there is no room now."""
        limit = self._state.config.max_streams
        if count > limit:
            raise InvalidRequestError(
                f"the request asks for {count} answers and this front makes at most {limit} at "
                "once; send several requests",
                param="n",
            )
        if count > self._taken:
            self._state._take(count - self._taken)
            self._taken = count

    def leave(self) -> None:
        self._state._streams -= self._taken
        self._taken = 0
