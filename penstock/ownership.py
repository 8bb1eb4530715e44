"""Owners in the store: whose leases and rolling states are whose, over a request's failures.

    R                       everything of request R
    R/prompt                what only the hand-over needs; decode drops it once it has attached
    R/prompt/ATTEMPT        what that attempt's prefill worker published
    R/prompt/ATTEMPT/decode what that attempt's decode worker attaches
    R/answer/ATTEMPT        what that attempt's decode worker published

Releasing an owner releases all that are below it. So a worker that was left for dead and still
cleans up takes nothing away from the one that took over, and the end of a request leaves nothing.
"""

from __future__ import annotations

HAND_BACK_S = 1.0
"""How long a worker whose caller went away keeps its leases: the caller may have lost only the
connection, and another worker then goes on from what they hold."""


def of_handover(request_id: str) -> str:
    return f"{request_id}/prompt"


def of_prompt(request_id: str, attempt: int) -> str:
    return f"{request_id}/prompt/{attempt}"


def of_attach(request_id: str, attempt: int) -> str:
    return f"{request_id}/prompt/{attempt}/decode"


def of_answer(request_id: str, attempt: int) -> str:
    return f"{request_id}/answer/{attempt}"
