"""Forgets what has expired, a bounded piece a transaction: a large job blocks nobody."""

from __future__ import annotations

from kvstore.journal import files
from kvstore.journal.contracts import Job
from kvstore.journal.jobs import load_job, save_job
from kvstore.journal.keys import idempotency, listing, part
from kvstore.journal.tables import Transaction

_SWEEP_ROWS = 500
_SWEEP_BLOBS = 16


def sweep(tx: Transaction, now_s: float) -> int:
    """One piece of one expired thing; rows removed."""
    due = tx.rows(b"x/", limit=1)
    if not due or int(due[0][0].split(b"/")[1]) > now_s * 1e3:
        return 0
    key, what = due[0][0], tx.load(due[0][0])
    if "blob" in what:
        files.forget(tx, what["blob"])
        removed = _remove(tx, b"b/" + what["blob"].encode() + b"/", _SWEEP_BLOBS)
        if not removed:
            tx.delete(key)
        return removed + 1
    job = load_job(tx, what["job"])
    if job is None:
        tx.delete(key)
        return 1
    return _take_apart(tx, job, key)


def _take_apart(tx: Transaction, job: Job, expiry: bytes) -> int:
    # First out of sight, then piece by piece; the expiry row stays until nothing is left.
    if job.state != "draft":
        tx.delete(listing(job))
        if job.key:
            known = tx.load(idempotency(job))
            if known and known["job"] == job.id:
                tx.delete(idempotency(job))
        save_job(tx, job, state="draft")
        return 1
    if removed := _remove(tx, part(b"b", job.id) + b"/", _SWEEP_BLOBS):
        return removed
    for kind in (b"e", b"p", b"i", b"g"):
        if removed := _remove(tx, part(kind, job.id) + b"/", _SWEEP_ROWS):
            return removed
    tx.delete(part(b"J", job.id))
    tx.delete(expiry)
    return 1


def _remove(tx: Transaction, prefix: bytes, limit: int) -> int:
    rows = tx.rows(prefix, limit=limit)
    for key, _ in rows:
        tx.delete(key)
    return len(rows)
