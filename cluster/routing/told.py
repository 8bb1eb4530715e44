"""`Told`: a decision as `penstock explain` shows it, and `Decisions`, the last ones of a front."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from cluster.policy import Cost, Decision
from penstock.errors import UsageError

MOST_DECISIONS = 512
"""Remembered by one front."""
MOST_ROWS = 65_536
"""Of all of them together: a decision has a row for each worker."""


@dataclass(frozen=True)
class Told:
    """What was decided and why. Nothing of the prompt but its length."""

    request_id: str
    at: float
    """Unix time."""
    policy: str
    unit: str
    facts: Mapping[str, float]
    """Of the request: `prompt_tokens`, `max_tokens`, `resumable_tokens`, `overlap_tokens`,
    `fetch_bytes`, and `mirror_age_s`, the age of the picture of the store; -1 for none.
    """
    prefill: str
    decode: str
    rows: tuple[Cost, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "object": "route",
            "request_id": self.request_id,
            "at": round(self.at, 3),
            "policy": self.policy,
            "unit": self.unit,
            "facts": dict(self.facts),
            "prefill": self.prefill,
            "decode": self.decode,
            "workers": [
                {
                    "id": row.worker_id,
                    "role": row.role,
                    "total": _number(row.total),
                    "parts": {name: _number(value) for name, value in row.parts.items()},
                    "facts": dict(row.facts),
                    "barred": row.barred,
                }
                for row in self.rows
            ],
        }

    @classmethod
    def from_json(cls, content: Any, place: str) -> Told:
        """Raises UsageError if `content` (from `place`) is not what `to_json` makes."""
        try:
            return cls(
                request_id=str(content["request_id"]),
                at=float(content["at"]),
                policy=str(content["policy"]),
                unit=str(content["unit"]),
                facts={str(k): float(v) for k, v in content["facts"].items()},
                prefill=str(content["prefill"]),
                decode=str(content["decode"]),
                rows=tuple(
                    Cost(
                        str(row["id"]),
                        str(row["role"]),
                        _seconds(row["total"]),
                        {str(k): _seconds(v) for k, v in row["parts"].items()},
                        {str(k): float(v) for k, v in row["facts"].items()},
                        str(row["barred"]),
                    )
                    for row in content["workers"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{place} holds no route as `penstock explain --json` writes it ({error!r})"
            ) from error


def _number(value: float) -> float | None:
    """None for never: JSON has no infinity."""
    return value if isfinite(value) else None


def _seconds(value: Any) -> float:
    return float("inf") if value is None else float(value)


@dataclass(frozen=True)
class _Kept:
    decision: Decision
    tenant: bytes
    at: float
    mirror_age_s: float


class Decisions:
    """The last decisions by request id, the newest of each. Bounded; tables are made when asked
    for.
    """

    def __init__(self, *, most: int = MOST_DECISIONS, most_rows: int = MOST_ROWS) -> None:
        self._most, self._most_rows = most, most_rows
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(
        self,
        request_id: str,
        decision: Decision,
        *,
        tenant: bytes,
        at: float,
        mirror_age_s: float,
        rows: int,
    ) -> None:
        """`rows`: workers in the decision's table."""
        self._kept.pop(request_id, None)
        self._kept[request_id] = _Kept(decision, tenant, at, mirror_age_s)
        most = max(1, min(self._most, self._most_rows // max(1, rows)))
        while len(self._kept) > most:
            self._kept.popitem(last=False)

    def told(self, request_id: str, *, tenant: bytes) -> Told | None:
        """None if it is not remembered, or another tenant's."""
        kept = self._kept.get(request_id)
        if kept is None or kept.tenant != tenant:
            return None
        decision = kept.decision
        shape, resident, route = decision.shape, decision.resident, decision.route
        return Told(
            request_id=request_id,
            at=kept.at,
            policy=decision.policy.value,
            unit=decision.unit,
            facts={
                "prompt_tokens": shape.prompt_tokens,
                "max_tokens": shape.max_tokens,
                "resumable_tokens": resident.resumable_tokens,
                "overlap_tokens": resident.overlap_tokens,
                "fetch_bytes": resident.fetch_bytes,
                "mirror_age_s": kept.mirror_age_s if isfinite(kept.mirror_age_s) else -1.0,
            },
            prefill=route.prefill.worker_id,
            decode=route.decode.worker_id,
            rows=tuple(decision.table()),
        )
