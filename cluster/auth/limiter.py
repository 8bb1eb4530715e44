"""What each key has used in this process, and whether it may have more.

Limits hold per front process: with N front replicas a key may use up to N times as much. The
bookkeeping is bounded by the number of keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.auth.buckets import Bucket
from cluster.auth.contracts import Caller, Limits
from penstock.errors import ContextLengthError, RateLimitError

_MINUTE_S = 60.0
_DAY_S = 86_400.0
_BUCKETS = {
    "requests_per_minute": _MINUTE_S,
    "tokens_per_minute": _MINUTE_S,
    "tokens_per_day": _DAY_S,
}
_MOST_ACCOUNTS = 20_000


@dataclass
class _Account:
    limits: Limits
    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)

    def follow(self, limits: Limits, now_s: float) -> None:
        """Buckets for the limits as they are now."""
        if limits == self.limits and self.buckets:
            return
        self.limits = limits
        buckets = {}
        for name, period_s in _BUCKETS.items():
            capacity = getattr(limits, name)
            if capacity is not None:
                old = self.buckets.get(name)
                buckets[name] = (
                    Bucket.full(capacity, period_s=period_s, now_s=now_s)
                    if old is None
                    else old.resized(capacity, period_s=period_s, now_s=now_s)
                )
        self.buckets = buckets


class Limiter:
    """Accounts by key. Belongs to one event loop; `enter` gives an `Admission` or refuses."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, caller: Caller) -> Admission:
        """One request begins. Raises RateLimitError with the time after which to try again."""
        now_s = self._clock()
        account = self._account(caller, now_s)
        limits = caller.limits
        if limits.concurrent_requests is not None and account.running >= limits.concurrent_requests:
            raise RateLimitError(
                f"this API key has {account.running} requests in progress, which is its limit; "
                "wait until one has ended",
                code="concurrent_requests_exceeded",
            )
        self._require(account, "requests_per_minute", now_s)
        self._take(account, "requests_per_minute", 1.0, now_s)
        account.running += 1
        return Admission(self, account, caller)

    def headers(self, caller: Caller) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, for the limits per minute that the key has."""
        account = self._accounts.get(caller.key_id)
        if account is None:
            return {}
        now_s = self._clock()
        found = {}
        for name, label in (("requests_per_minute", "requests"), ("tokens_per_minute", "tokens")):
            bucket = account.buckets.get(name)
            if bucket is not None:
                left = max(0, int(bucket.refilled(now_s).level))
                found[f"x-ratelimit-limit-{label}"] = f"{bucket.capacity:.0f}"
                found[f"x-ratelimit-remaining-{label}"] = str(left)
                found[f"x-ratelimit-reset-{label}"] = span(bucket.wait_s(now_s, bucket.capacity))
        return found

    def _account(self, caller: Caller, now_s: float) -> _Account:
        account = self._accounts.get(caller.key_id)
        if account is None:
            if len(self._accounts) >= _MOST_ACCOUNTS:
                self._forget()
            account = self._accounts[caller.key_id] = _Account(caller.limits)
        account.follow(caller.limits, now_s)
        return account

    def _forget(self) -> None:
        """Idle accounts go. More keys than a file may hold have come and gone to get here."""
        idle = [key for key, account in self._accounts.items() if not account.running]
        for key in idle:
            del self._accounts[key]

    def _require(self, account: _Account, name: str, now_s: float) -> None:
        bucket = account.buckets.get(name)
        wait_s = bucket.wait_s(now_s) if bucket is not None else 0.0
        if bucket is None or not wait_s:
            return
        what, period = name.split("_per_")
        raise RateLimitError(
            f"this API key has used up its {bucket.capacity:.0f} {what} per {period}; try again in "
            f"{span(wait_s)}",
            code="insufficient_quota" if period == "day" else "rate_limit_exceeded",
            retry_after_s=wait_s,
        )

    def _take(self, account: _Account, name: str, amount: float, now_s: float) -> None:
        bucket = account.buckets.get(name)
        if bucket is not None:
            account.buckets[name] = bucket.taken(amount, now_s)


class Admission:
    """One admitted request of a key, until `leave`."""

    def __init__(self, limiter: Limiter, account: _Account, caller: Caller) -> None:
        self._limiter = limiter
        self._account = account
        self._left = False
        self.caller = caller

    def check(self, prompt_tokens: int) -> None:
        """Before work begins. Raises ContextLengthError for a prompt that this key may not send,
        RateLimitError while its tokens are used up.
        """
        most = self._account.limits.max_prompt_tokens
        if most is not None and prompt_tokens > most:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and this API key may send at most {most}; "
                "shorten it",
                param="messages",
                code="prompt_tokens_exceeded",
            )
        now_s = self._limiter._clock()
        for name in ("tokens_per_day", "tokens_per_minute"):
            self._limiter._require(self._account, name, now_s)

    def charge(self, tokens: int) -> None:
        """Tokens that cost work; a negative number gives back what was charged too much."""
        now_s = self._limiter._clock()
        for name in ("tokens_per_minute", "tokens_per_day"):
            self._limiter._take(self._account, name, tokens, now_s)

    def leave(self) -> None:
        """The request has ended. May be called again."""
        if not self._left:
            self._left = True
            self._account.running -= 1


def span(seconds: float) -> str:
    """OpenAI's spelling of a time span: `12ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < _MINUTE_S:
        return f"{round(seconds, 2):g}s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}h{minutes}m{whole % 60}s" if hours else f"{minutes}m{whole % 60}s"
