"""What is kept of an answer beside its text, for those who asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.request import TokenChunk


@dataclass
class TokenRecord:
    """Ids and logits digests of an answer's tokens, for those who check that two paths agree."""

    ids: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def add(self, chunk: TokenChunk) -> dict[str, Any]:
        """What a streamed chunk says of its tokens."""
        digests = [d.hex() for d in chunk.logits_digests]
        self.ids += chunk.token_ids
        self.digests += digests
        return {"token_ids": list(chunk.token_ids), "logits_digests": digests}

    def of_answer(self) -> dict[str, Any]:
        return {"token_ids": self.ids, "logits_digests": self.digests}
