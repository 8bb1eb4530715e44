"""A prefill and a decode worker over one store, called as the front calls them; and an oracle."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from blake3 import blake3

from decode.grammar import Grammars
from decode.worker import DecodeWorker
from kvstore.contracts import BlockStore
from kvstore.fake import MemoryBlockStore
from model.engine import Segment
from model.fake import EOS, FakeEngine, FakeSettings
from model.sampler import sample
from penstock.errors import PenstockError
from penstock.request import Sampling
from penstock.rpc import channel_options, error_from_rpc
from penstock.tokenizer import ByteTokenizer
from penstock.worker import ModelSpec, WorkerSpec
from prefill.worker import PrefillWorker
from protos.penstock.worker.v1 import worker_pb2, worker_pb2_grpc

NAMESPACE = b"n" * 32
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.0, seed=7)


def spec(worker_id: str, **changes: Any) -> WorkerSpec:
    base = {"worker_id": worker_id, "model": ModelSpec(model="fake"), "store_address": "memory"}
    return WorkerSpec.model_validate(base | {"chunk_tokens": 512} | changes)


def memory_store(engine: FakeEngine, **options: Any) -> MemoryBlockStore:
    info = engine.info
    return MemoryBlockStore(fingerprint=info.fingerprint, layout=info.layout, **options)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return [(seed * 31 + i * i * 7 + i // 3) % 251 for i in range(length)]


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    completion_tokens: int = 0
    cached_tokens: int = -1
    computed_tokens: int = -1
    digests: list[bytes] = field(default_factory=list)
    evidence: list[tuple[int, int]] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)


def oracle(
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    ignore_eos: bool = False,
    min_tokens: int = 0,
) -> Answer:
    """The plain loop: one engine, one sequence, the whole prompt at once."""
    engine = FakeEngine()
    sequence = engine.open(len(prompt) + max_tokens)
    engine.forward([Segment(sequence, list(prompt))])
    answer = Answer(reason="length")
    for count in range(max_tokens):
        row = engine.logits([sequence]).row(0)
        forbidden = engine.info.eos_token_ids if count < min_tokens else frozenset()
        token = sample(row, sampling, position=sequence.position, forbidden=forbidden)
        answer.token_ids.append(token)
        answer.digests.append(blake3(row.cast("B")).digest()[:8])
        answer.evidence += [
            (span.start, min(span.end, len(prompt)))
            for span in engine.evidence(sequence)
            if span.start < len(prompt)
        ]
        if token == EOS and not ignore_eos:
            answer.reason = "stop"
            break
        engine.forward([Segment(sequence, [token])])
    answer.text = ByteTokenizer().decode(answer.token_ids)
    return answer


@dataclass
class Pair:
    """Both workers, their engines and stores."""

    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_engine: FakeEngine
    decode_engine: FakeEngine
    store: BlockStore
    prefill_stub: Any
    decode_stub: Any
    names: list[str] = field(default_factory=list)
    fingerprint: bytes = b""
    """Instead of the engines' own."""

    def prompt(self, tokens: Sequence[int], name: str = "") -> worker_pb2.Prompt:
        self.names.append(name or f"request-{len(self.names)}")
        return worker_pb2.Prompt(
            request_id=self.names[-1],
            token_ids=tokens,
            namespace=NAMESPACE,
            fingerprint=self.fingerprint or self.prefill_engine.info.fingerprint,
        )

    async def read(
        self,
        tokens: Sequence[int],
        *,
        answer: Answer | None = None,
        boundaries: Sequence[int] = (),
        prompt: worker_pb2.Prompt | None = None,
    ) -> Answer:
        """Prefill alone."""
        answer = answer or Answer()
        call = self.prefill_stub.Run(
            worker_pb2.PrefillRequest(
                prompt=prompt or self.prompt(tokens), boundaries=boundaries, lease_ttl_ms=5000
            ),
            timeout=30,
        )
        with mapped_errors():
            async for event in call:
                match event.WhichOneof("event"):
                    case "progress":
                        answer.progress.append(event.progress.tokens_done)
                    case "done":
                        answer.cached_tokens = event.done.cached_tokens
                        answer.computed_tokens = event.done.computed_tokens
        return answer

    async def ask(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 24,
        sampling: Sampling = GREEDY,
        boundaries: Sequence[int] = (),
        prefill: bool = True,
        on_tokens: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> Answer:
        """Decode, and prefill once decode has granted; as the front does it."""
        answer, prompt = Answer(), self.prompt(tokens)
        fields = {"prefill_timeout_ms": 20_000, "admission_timeout_ms": 10_000} | fields
        call = self.decode_stub.Generate(
            worker_pb2.GenerateRequest(
                prompt=prompt,
                sampling=worker_pb2.Sampling(
                    temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed
                ),
                max_tokens=max_tokens,
                lease_ttl_ms=5000,
                logits_digest=True,
                **fields,
            ),
            timeout=30,
        )
        reading: asyncio.Task[Answer] | None = None
        try:
            with mapped_errors():
                async for event in call:
                    match event.WhichOneof("event"):
                        case "granted" if prefill:
                            reading = asyncio.create_task(
                                self.read(
                                    tokens, answer=answer, boundaries=boundaries, prompt=prompt
                                )
                            )
                        case "tokens":
                            answer.indices.append(event.tokens.index)
                            answer.token_ids += event.tokens.token_ids
                            answer.text += event.tokens.text
                            answer.digests += event.tokens.logits_digests
                            answer.evidence += [(e.start, e.end) for e in event.tokens.evidence]
                            on_tokens()
                        case "finished":
                            answer.reason = event.finished.reason
                            answer.text += event.finished.text
                            answer.completion_tokens = event.finished.completion_tokens
            if reading is not None:
                await reading
        finally:
            call.cancel()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        return answer

    def held(self) -> dict[str, float]:
        """All that must be zero when nothing runs."""
        scheduler, admission = self.prefill.scheduler, self.decode.admission
        return {
            "prefill sequences": self.prefill_engine.open_sequences,
            "decode sequences": self.decode_engine.open_sequences,
            "prefill bytes": scheduler.used_bytes,
            "prefill running": scheduler.running,
            "prefill queued": scheduler.queued,
            "prefill tokens": scheduler.pending_tokens,
            "decode bytes": admission.reserved_bytes,
            "decode running": admission.running,
            "decode queued": admission.queued,
            "decode pages": admission.pages,
            "decode tokens": admission.tokens,
        }

    async def settles(self, within_s: float = 2.0) -> None:
        """Everything is given back within 2 s, leases too."""
        until = time.monotonic() + within_s
        while True:
            stat = await self.store.stat()
            held = self.held() | {"leases": stat.leases, "open puts": stat.open_puts}
            if not any(held.values()):
                return
            if time.monotonic() > until:
                raise AssertionError(f"still held: { {k: v for k, v in held.items() if v} }")
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def mapped_errors() -> Any:
    """The error tree's classes instead of gRPC's."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, peer="worker") from error


@contextlib.asynccontextmanager
async def pair(
    *,
    store: BlockStore | None = None,
    settings: FakeSettings | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    decode_grammars: Grammars | None = None,
) -> AsyncIterator[Pair]:
    """Two running workers. `prefill` and `decode` change their specs."""
    engines = FakeEngine(settings), FakeEngine(settings)
    store = store or memory_store(engines[0])
    reader = PrefillWorker(spec("prefill-0", **(prefill or {})), engines[0], store)
    writer = DecodeWorker(
        spec("decode-0", **(decode or {})),
        engines[1],
        store,
        decode_bytes=ByteTokenizer().decode_bytes,
        grammars=decode_grammars,
    )
    try:
        addresses = await reader.start(), await writer.start()
        async with (
            grpc.aio.insecure_channel(addresses[0], options=channel_options()) as one,
            grpc.aio.insecure_channel(addresses[1], options=channel_options()) as other,
        ):
            yield Pair(
                reader,
                writer,
                *engines,
                store,
                worker_pb2_grpc.PrefillStub(one),
                worker_pb2_grpc.DecodeStub(other),
            )
    finally:
        await reader.stop()
        await writer.stop()


async def failure(answer: Any) -> PenstockError:
    """The error that awaiting `answer` raises."""
    try:
        await answer
    except PenstockError as error:
        return error
    raise AssertionError("the call did not fail")


async def eventually(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Until `condition()` holds."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        await asyncio.sleep(0.005)
