"""The journal's keys: ASCII paths, ordered byte by byte.

J/<job>                      the job                    l/<tenant>/<newest first>/<job>  listing
r/<job>                      it runs                    k/<tenant>/<key>   idempotency keys
g/<job>/<group>              a document and its lease   p/<job>/<group>    it has items left
i/<job>/<item>               a question                 e/<job>/<cursor>   a result
F/<file>                     a file                     f/<tenant>/<newest first>/<file> listing
b/<blob>/<chunk>             bytes                      x/<when>/<what>    what expires
"""

from __future__ import annotations

import hashlib

from kvstore.journal.contracts import Job


def short(text: str) -> bytes:
    """A tenant or an idempotency key, whatever it holds, as a part of a path."""
    return hashlib.sha256(text.encode()).hexdigest()[:32].encode()


def part(kind: bytes, job_id: str, number: int | None = None) -> bytes:
    """A row of a job."""
    key = kind + b"/" + job_id.encode()
    return key if number is None else key + b"/%010d" % number


def listing(job: Job) -> bytes:
    newest_first = 10**15 - int(job.created_s * 1e3)
    return b"l/" + short(job.tenant) + b"/%016d/" % newest_first + job.id.encode()


def idempotency(job: Job) -> bytes:
    return b"k/" + short(job.tenant) + b"/" + short(job.key)


def expiry_key(when_s: float, what: str) -> bytes:
    return b"x/%016d/" % max(0, int(when_s * 1e3)) + what.encode()


def blob_key(blob: str, number: int) -> bytes:
    return b"b/" + blob.encode() + b"/%06d" % number
