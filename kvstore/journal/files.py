"""Uploaded files as rows: `F/<id>`, `f/<tenant>/<newest first>/<id>`, and their blob."""

from __future__ import annotations

from kvstore.journal.contracts import File
from kvstore.journal.keys import expiry_key, short
from kvstore.journal.tables import Transaction
from penstock.errors import NotFoundError


def _row(file_id: str) -> bytes:
    return b"F/" + file_id.encode()


def _listing_prefix(tenant: str) -> bytes:
    return b"f/" + short(tenant) + b"/"


def _listing(file: File) -> bytes:
    newest_first = 10**15 - int(file.created_s * 1e3)
    return _listing_prefix(file.tenant) + b"%016d/" % newest_first + file.id.encode()


def add(tx: Transaction, file: File) -> None:
    before = tx.load(_row(file.id))
    if before is not None:
        tx.delete(expiry_key(before["expires_s"], file.id))
    tx.save(_row(file.id), file)
    tx.put(_listing(file), file.id.encode())
    tx.save(expiry_key(file.expires_s, file.id), {"blob": file.id})


def find(tx: Transaction, file_id: str, tenant: str, now_s: float) -> File:
    row = tx.load(_row(file_id))
    file = None if row is None else File(**row)
    if file is None or file.tenant != tenant or not _seen(file, now_s):
        raise NotFoundError(f"there is no file {file_id[:80]!a}; it may have expired")
    return file


def listed(tx: Transaction, tenant: str, limit: int, after: str, now_s: float) -> list[File]:
    start = _listing(find(tx, after, tenant, now_s)) if after else None
    found = []
    for _, raw in tx.rows(_listing_prefix(tenant), after=start, limit=limit):
        row = tx.load(_row(raw.decode()))
        if row is not None and _seen(File(**row), now_s):
            found.append(File(**row))
    return found


def forget(tx: Transaction, file_id: str) -> None:
    """What the sweep leaves of an expired file: nothing."""
    row = tx.load(_row(file_id))
    if row is not None:
        tx.delete(_row(file_id))
        tx.delete(_listing(File(**row)))


def _seen(file: File, now_s: float) -> bool:
    return file.size_bytes >= 0 and file.expires_s > now_s


def delete(tx: Transaction, file_id: str, tenant: str, now_s: float) -> None:
    """Out of sight at once; the sweep takes its bytes."""
    file = find(tx, file_id, tenant, now_s)
    tx.delete(_row(file_id))
    tx.delete(_listing(file))
    tx.delete(expiry_key(file.expires_s, file_id))
    tx.save(expiry_key(0.0, file_id), {"blob": file_id})
