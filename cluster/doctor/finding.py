"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where nothing is wrong; else it says what to do. Only a `fatal` one keeps a
    cluster from working here.
    """

    check: str
    """Which check: a name for scripts."""
    what: str
    fix: str = ""
    fatal: bool = True

    @property
    def state(self) -> str:
        """`ok`, `note` or `fail`."""
        if not self.fix:
            return "ok"
        return "fail" if self.fatal else "note"

    @property
    def line(self) -> str:
        mark = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[self.state]
        return f"{mark} {self.what}" + (f"; {self.fix}" if self.fix else "")

    def as_json(self) -> dict[str, str]:
        return {"check": self.check, "state": self.state, "what": self.what, "fix": self.fix}
