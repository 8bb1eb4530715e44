"""Known vulnerabilities of the pinned packages: `python -m tests.security.audit`, in `make check`.

pip-audit asks OSV about every line of constraints.txt. Exit codes: 0 nothing known, or the service
cannot be asked (one line says so: a machine without a network must be able to check its code); 1 a
pinned version is known to be vulnerable; 2 the audit itself is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[2] / "constraints.txt"
SERVICE = "https://api.osv.dev/v1/query"
DEADLINE_S = 180.0
"""For all pins together; asked one after another, each takes some tenths of a second."""
ACCEPTED: dict[str, str] = {}
"""Reason by vulnerability id: what is known, does not reach us, and has no fixed version yet."""
_UNREACHABLE = ("ConnectionError", "ServiceError", "Timeout", "HTTPError", "SSLError", "ProxyError")


def audit(pins: Path, *, service: str = SERVICE, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
    """Exit code and what to say."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(pins), "--no-deps", "--disable-pip"]
    command += ["-s", "osv", "--osv-url", service, "--timeout", "10", "-f", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0, f"audit: not done, {service} did not answer for all pins in {deadline_s:.0f} s"
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
        if any(word in done.stderr for word in _UNREACHABLE):
            return 0, f"audit: not done, {service} cannot be asked"
        return 2, f"audit: pip-audit failed: {last}"
    asked = [row for row in rows if "skip_reason" not in row]
    if rows and not asked:
        return 0, f"audit: not done, {service} knows none of the {len(rows)} packages"
    bad = [
        f"audit: {row['name']} {row['version']} has {vuln['id']}; "
        + (
            f"pin {' or '.join(vuln['fix_versions'])}"
            if vuln["fix_versions"]
            else "no version is fixed: replace it, or give a reason in tests/security/audit.py"
        )
        for row in asked
        for vuln in row["vulns"]
        if vuln["id"] not in ACCEPTED
    ]
    if bad:
        return 1, "\n".join(bad)
    return 0, f"audit: nothing known against {len(asked)} of {len(rows)} pinned packages"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=Path, default=PINS)
    options = parser.parse_args()
    code, text = audit(options.pins)
    print(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
