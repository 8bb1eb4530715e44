"""Who a block is: fingerprint, tenant namespace, and the hash chain over token ids.

    fingerprint = SHA256(canonical JSON of all that changes the stored numbers)
    namespace   = HMAC-SHA256(cluster key, tenant || 0x00 || cache salt)
    h_0 = SHA256("penstock-kv-1" || fingerprint || namespace)
    h_i = SHA256(h_{i-1} || u32le tokens of block i)            i = 1, 2, ...
    state(p) = SHA256("state" || h_{p // 256} || u32le tokens of the unfinished block)

Canonical and seedless on purpose: a client in any language computes the same ids. The test vectors
are in `docs/kv-identity.md` and in `tests/penstock/test_identity.py`. A million tokens cost about 8
ms.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.blocks import BLOCK_TOKENS

_ROOT_TAG = b"penstock-kv-1"
_STATE_TAG = b"state"


def fingerprint(facts: dict[str, Any]) -> bytes:
    """SHA-256 of `facts` as canonical JSON (sorted keys, no spaces, ASCII). 32 bytes."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def namespace(cluster_key: bytes, tenant: str, cache_salt: str = "") -> bytes:
    """The tenant's namespace. 32 bytes; without the cluster key nobody can guess another tenant's
    ids.
    """
    message = tenant.encode() + b"\0" + cache_salt.encode()
    return hmac.new(cluster_key, message, hashlib.sha256).digest()


def tenant_tag(cluster_key: bytes, tenant: str) -> bytes:
    """Whose work it is, for fair shares: 16 bytes that name the tenant to nobody without the key.

    One for all salts of a tenant, and in no namespace's form.
    """
    return hmac.new(cluster_key, b"tenant tag\0" + tenant.encode(), hashlib.sha256).digest()[:16]


def _u32le(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if packed.itemsize != 4:
        packed = array("L", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


@dataclass(frozen=True)
class Chain:
    """Block and state ids of one prompt under one fingerprint and namespace.

    `blocks[i]` is the id of block i (tokens [256 i, 256 (i + 1))). Immutable; `extend` returns a
    longer one.
    """

    root: bytes
    blocks: tuple[bytes, ...]
    tokens: tuple[int, ...]

    @classmethod
    def start(cls, fingerprint_: bytes, namespace_: bytes) -> Chain:
        return cls(hashlib.sha256(_ROOT_TAG + fingerprint_ + namespace_).digest(), (), ())

    def extend(self, tokens: Sequence[int]) -> Chain:
        every = (*self.tokens, *tokens)
        blocks = list(self.blocks)
        previous = blocks[-1] if blocks else self.root
        for start in range(len(blocks) * BLOCK_TOKENS, len(every) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            body = _u32le(every[start : start + BLOCK_TOKENS])
            previous = hashlib.sha256(previous + body).digest()
            blocks.append(previous)
        return Chain(self.root, tuple(blocks), every)

    def parent(self, index: int) -> bytes:
        return self.blocks[index - 1] if index else self.root

    def state_id(self, position: int) -> bytes:
        """Id of the state after `position` tokens (0 < position <= len(tokens))."""
        if not 0 < position <= len(self.tokens):
            raise ValueError(f"position {position} is outside 1..{len(self.tokens)}")
        full = position // BLOCK_TOKENS
        tail = _u32le(self.tokens[full * BLOCK_TOKENS : position])
        return hashlib.sha256(_STATE_TAG + self.parent(full) + tail).digest()
