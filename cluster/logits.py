"""`penstock logits`: the parity tool. Logits of every position, by the very paths that serving
takes.

The prefill part runs in chunks; then its blocks and its state are packed into the store's objects,
verified and unpacked as a decode worker would, and the remaining tokens go one by one through
decode steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.codec import decode, digest_now, encode_prefix
from kvstore.contracts import StoreObject
from model.engine import Engine, EngineInfo, Segment, Sequence
from model.open import open_engine
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.errors import InvalidRequestError, UsageError
from penstock.identity import Chain
from penstock.worker import ModelSpec, RankSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def read_tokens(path: Path, info: EngineInfo) -> list[int]:
    """A JSON list of token ids. Raises `UsageError` naming the file and the first bad entry, or
    `InvalidRequestError` if the model admits fewer tokens.
    """
    try:
        tokens = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read token ids from {path}: {error}") from error
    if not isinstance(tokens, list) or not tokens:
        raise UsageError(f"{path} must hold a JSON list with at least one token id")
    for at, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < info.vocab_size:
            raise UsageError(
                f"{path}: entry {at} is {token!r}, not a token id of 0..{info.vocab_size - 1}"
            )
    if len(tokens) > info.max_model_len:
        raise InvalidRequestError(
            f"{path} holds {len(tokens)} tokens; this model admits at most {info.max_model_len}"
        )
    return tokens


def run(
    spec: ModelSpec,
    ranks: RankSpec,
    *,
    tokens_path: Path,
    out_path: Path,
    chunk_tokens: int,
    prefill_tokens: int | None = None,
    batch_with: Path | None = None,
) -> int:
    """Writes `logits` [T, V] float32. Exit code 0."""
    import numpy as np
    from safetensors.numpy import save_file

    if chunk_tokens < 1:
        raise UsageError(f"--chunk-tokens must be at least 1, not {chunk_tokens}")
    engine = open_engine(spec, ranks)
    try:
        tokens = read_tokens(tokens_path, engine.info)
        beside = read_tokens(batch_with, engine.info) if batch_with else None
        split = len(tokens) if prefill_tokens is None else prefill_tokens
        if not 1 <= split <= len(tokens):
            raise UsageError(f"--prefill-tokens must be 1..{len(tokens)}, not {split}")
        rows = _prefill(engine, tokens[:split], chunk_tokens)
        if split < len(tokens):
            sequence = rows.pop_sequence(engine, tokens)
            rows.extend(_decode(engine, sequence, tokens[split:], beside, chunk_tokens))
        logits = np.stack(rows.rows)
        save_file({"logits": np.ascontiguousarray(logits, dtype=np.float32)}, out_path)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    finally:
        engine.close()
    return 0


class _Rows:
    """Logit rows so far, and the objects that a prefill worker would have published."""

    def __init__(self) -> None:
        self.rows: list[npt.NDArray[np.float32]] = []
        self.objects: list[tuple[bytes, bytes, StoreObject]] = []

    def extend(self, rows: list[npt.NDArray[np.float32]]) -> None:
        self.rows.extend(rows)

    def pop_sequence(self, engine: Engine, tokens: list[int]) -> Sequence:
        """A fresh sequence restored from the published objects, as a decode worker would."""
        sequence = engine.open(len(tokens))
        info = engine.info
        for data, digest, item in self.objects:
            got = decode(
                data,
                id_=item.id,
                digest=digest,
                fingerprint=info.fingerprint,
                layout=info.layout,
            )
            if got.kind is ObjectKind.BLOCK:
                engine.load_block(sequence, got.index, got.payload)
            else:
                engine.load_state(sequence, got.index, got.payload)
        self.objects.clear()
        return sequence


def _prefill(engine: Engine, tokens: list[int], chunk_tokens: int) -> _Rows:
    import numpy as np

    out, info = _Rows(), engine.info
    sequence = engine.open(len(tokens))
    for start in range(0, len(tokens), chunk_tokens):
        chunk = tokens[start : start + chunk_tokens]
        (result,) = engine.forward([Segment(sequence, chunk, all_logits=True)])
        assert result.logits is not None
        out.extend([np.array(result.logits.row(i)) for i in range(len(result.logits))])
    chain = Chain.start(info.fingerprint, b"\0" * 32).extend(tokens)
    items = [
        StoreObject(
            ObjectKind.BLOCK, chain.blocks[i], chain.parent(i), i, engine.export_block(sequence, i)
        )
        for i in range(len(tokens) // BLOCK_TOKENS)
    ]
    items.append(
        StoreObject(
            ObjectKind.STATE,
            chain.state_id(len(tokens)),
            chain.parent(len(tokens) // BLOCK_TOKENS),
            len(tokens),
            engine.export_state(sequence),
        )
    )
    for item in items:
        data = encode_prefix(item, fingerprint=info.fingerprint, layout=info.layout) + item.payload
        out.objects.append((data, digest_now(data), item))
    engine.release(sequence)
    return out


def _decode(
    engine: Engine,
    sequence: Sequence,
    tokens: list[int],
    beside: list[int] | None,
    chunk_tokens: int,
) -> list[npt.NDArray[np.float32]]:
    """One token a step; a second sequence steps beside it for as long as it has tokens."""
    import numpy as np

    other: Sequence | None = None
    rest: list[int] = []
    if beside:
        other = engine.open(len(beside))
        half = max(1, len(beside) // 2)
        for start in range(0, half, chunk_tokens):
            chunk = beside[start : min(half, start + chunk_tokens)]
            engine.forward([Segment(other, chunk)])
        rest = beside[half:]
    rows = []
    for token in tokens:
        segments = [Segment(sequence, [token], all_logits=True)]
        if other is not None and rest:
            segments.append(Segment(other, [rest.pop(0)]))
        result = engine.forward(segments)[0]
        assert result.logits is not None
        rows.append(np.array(result.logits.row(0)))
    for each in (sequence, other):
        if each is not None:
            engine.release(each)
    return rows
