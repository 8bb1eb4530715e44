"""What the routes share: one object per app, no globals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.auth.authenticators import open_authenticator
from cluster.auth.limiter import Limiter
from cluster.auth.metered import MeteredService
from cluster.config import FrontSection
from cluster.contracts import ServedModel, Service
from penstock.chat import ChatEncoder
from penstock.errors import (
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from penstock.telemetry import Telemetry
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
    ) -> None:
        self.service: Service = MeteredService(service)
        self.config = config
        self.telemetry = telemetry
        telemetry.meters.set(M.REQUESTS_LIMIT, config.max_streams)
        self.sampling_defaults = dict(sampling_defaults)
        self._tokenizer = tokenizer
        self._chat = chat
        self._streams = 0
        self.authenticator = open_authenticator(
            api_keys=config.keys, keys_file=config.api_keys_file
        )
        self.limiter = Limiter()
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

    def take_stream(self) -> Callable[[], None]:
        """Counts a request in; the result counts it out. Raises `OverloadedError` at the limit."""
        if self._streams >= self.config.max_streams:
            raise OverloadedError(
                f"{self._streams} requests are in progress, which is this front's limit"
            )
        self._streams += 1

        def give_back() -> None:
            self._streams -= 1

        return give_back

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
        if size_bytes <= _INLINE_BYTES:
            result = work()
        else:
            result = await asyncio.get_running_loop().run_in_executor(self._encoders, work)
        self.telemetry.encoded(time.monotonic() - started)
        return result

    def close(self) -> None:
        self.authenticator.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
