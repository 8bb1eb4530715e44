"""Jobs as rows: what each step reads and writes. Pure functions of a transaction and the time.

J/<job>                      the job                    l/<tenant>/<newest first>/<job>  listing
r/<job>                      it runs                    k/<tenant>/<key>   idempotency keys
g/<job>/<group>              a document and its lease   p/<job>/<group>    it has items left
i/<job>/<item>               a question                 e/<job>/<cursor>   a result
b/<blob>/<chunk>             bytes                      x/<when>/<what>    what expires
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvstore.journal.contracts import (
    Claim,
    Committed,
    Item,
    ItemStatus,
    Job,
    NewGroup,
    Tokens,
)
from kvstore.journal.keys import blob_key, expiry_key, idempotency, listing, part, short
from kvstore.journal.tables import Transaction
from penstock.errors import ConflictError, InvalidRequestError, LeaseLostError, NotFoundError

_DRAFT_S = 3600.0
_PAGE = 64
_RETRY_SLICE = 500
# A pause (a restart, a night) must not look like the pace of work.
_LONGEST_PACE_S = 60.0
_PACE_WEIGHT = 0.1


def load_job(tx: Transaction, job_id: str) -> Job | None:
    row = tx.load(part(b"J", job_id))
    return None if row is None else Job(**row)


def save_job(tx: Transaction, job: Job, **changes: Any) -> Job:
    changed = dataclasses.replace(job, **changes)
    tx.save(part(b"J", job.id), changed)
    return changed


def find(tx: Transaction, job_id: str, tenant: str) -> Job:
    """Raises NotFoundError; a draft is not there yet, and other tenants' jobs do not exist."""
    job = load_job(tx, job_id)
    if job is None or job.tenant != tenant or job.state == "draft":
        raise NotFoundError(f"there is no job {job_id[:80]!a}; list the jobs to see which exist")
    return job


def begin(tx: Transaction, job: Job, now_s: float) -> None:
    if load_job(tx, job.id) is None:
        expires_s = now_s + _DRAFT_S
        save_job(tx, job, state="draft", expires_s=expires_s)
        tx.save(expiry_key(expires_s, job.id), {"job": job.id})


def append(tx: Transaction, job_id: str, groups: Sequence[NewGroup], now_s: float) -> None:
    job = _draft(tx, job_id)
    group_number, item_number = job.groups, job.items
    for group in groups:
        row = {
            "payload": group.payload,
            "blob": group.blob,
            "chunks": group.chunks,
            "first": item_number,
            "count": len(group.items),
            "left": len(group.items),
            "token": 0,
            "owner": "",
            "until_s": 0.0,
            "claims": 0,
            "tokens": 0,
        }
        tx.save(part(b"g", job_id, group_number), row)
        tx.put(part(b"p", job_id, group_number), b"1")
        for item in group.items:
            tx.save(
                part(b"i", job_id, item_number),
                {"id": item.id, "group": group_number, "payload": item.payload, "seq": 0},
            )
            item_number += 1
        group_number += 1
    # Whoever uploads for long is still there.
    expires_s = now_s + _DRAFT_S
    if job.expires_s is not None:
        tx.delete(expiry_key(job.expires_s, job_id))
    tx.save(expiry_key(expires_s, job_id), {"job": job_id})
    save_job(tx, job, groups=group_number, items=item_number, expires_s=expires_s)


def _draft(tx: Transaction, job_id: str) -> Job:
    job = load_job(tx, job_id)
    if job is None or job.state != "draft":
        raise NotFoundError("the submission has expired or has ended already; submit again")
    return job


def seal(tx: Transaction, job_id: str, digest: str, now_s: float) -> tuple[Job, bool]:
    job = load_job(tx, job_id)
    if job is not None and job.state != "draft" and job.digest == digest:
        # Repeated after an answer that was lost.
        return job, True
    job = _draft(tx, job_id)
    if job.items == 0:
        raise InvalidRequestError("the job has no question; submit at least one", param="questions")
    if job.key:
        known = tx.load(idempotency(job))
        before = load_job(tx, known["job"]) if known else None
        if before is not None:
            if before.digest != digest:
                raise ConflictError(
                    f"the idempotency key {job.key[:80]!a} belongs to {before.id}, which was "
                    "another job; use a new key",
                    code="idempotency_conflict",
                )
            return before, False
        tx.save(idempotency(job), {"job": job_id})
    if job.expires_s is not None:
        tx.delete(expiry_key(job.expires_s, job_id))
    tx.put(part(b"r", job_id), b"1")
    tx.put(listing(job), job_id.encode())
    changed = save_job(
        tx, job, state="running", digest=digest, expires_s=None, seq=1, started_s=now_s
    )
    return changed, True


def discard(tx: Transaction, job_id: str) -> None:
    job = load_job(tx, job_id)
    if job is not None and job.state == "draft":
        # The sweep takes it apart.
        _expire_at(tx, job, 0.0)


def _expire_at(tx: Transaction, job: Job, when_s: float, **changes: Any) -> Job:
    if job.expires_s is not None:
        tx.delete(expiry_key(job.expires_s, job.id))
    tx.save(expiry_key(when_s, job.id), {"job": job.id})
    return save_job(tx, job, expires_s=when_s, **changes)


def listed(tx: Transaction, tenant: str, limit: int, after: str) -> list[Job]:
    start = listing(find(tx, after, tenant)) if after else None
    rows = tx.rows(b"l/" + short(tenant) + b"/", after=start, limit=limit)
    jobs = (load_job(tx, raw.decode()) for _, raw in rows)
    return [job for job in jobs if job is not None and job.tenant == tenant]


def claim(
    tx: Transaction, owner: str, models: Sequence[str], lease_s: float, now_s: float, after: str
) -> Claim | None:
    """`after`: the job that was served last; the others come first."""
    start = part(b"r", after) if after else None
    running = tx.rows(b"r/", after=start, limit=_PAGE) if start else []
    seen = {key for key, _ in running}
    running += [row for row in tx.rows(b"r/", limit=_PAGE) if row[0] not in seen]
    for key, _ in running:
        job = load_job(tx, key.removeprefix(b"r/").decode())
        if job is None or job.state != "running" or (job.model and job.model not in models):
            continue
        found = _claim_of(tx, job, owner, lease_s, now_s)
        if found is not None:
            return found
    return None


def _claim_of(tx: Transaction, job: Job, owner: str, lease_s: float, now_s: float) -> Claim | None:
    prefix, last = part(b"p", job.id) + b"/", None
    while pending := tx.rows(prefix, after=last, limit=_PAGE):
        for key, _ in pending:
            last = key
            number = int(key.removeprefix(prefix))
            group_key = part(b"g", job.id, number)
            group = tx.load(group_key)
            if group["until_s"] > now_s:
                continue
            group |= {
                "token": group["token"] + 1,
                "owner": owner,
                "until_s": now_s + lease_s,
                "claims": group["claims"] + 1,
            }
            tx.save(group_key, group)
            return Claim(
                job=job,
                group=number,
                token=group["token"],
                payload=group["payload"],
                blob=group["blob"],
                chunks=group["chunks"],
                items=_pending_items(tx, job.id, group),
                claims=group["claims"],
            )
    return None


def _pending_items(tx: Transaction, job_id: str, group: dict[str, Any]) -> tuple[Item, ...]:
    first, count = group["first"], group["count"]
    before = part(b"i", job_id, first - 1) if first else None
    rows = tx.rows(part(b"i", job_id) + b"/", after=before, limit=count)
    found = []
    for number, (key, _) in enumerate(rows, start=first):
        row = tx.load(key)
        if not row["seq"]:
            found.append(Item(number, row["id"], row["payload"]))
    return tuple(found)


def _held(tx: Transaction, claim_: Claim) -> tuple[Job, bytes, dict[str, Any]]:
    """Raises LeaseLostError unless the claim is still the group's newest and the job runs."""
    job = load_job(tx, claim_.job.id)
    key = part(b"g", claim_.job.id, claim_.group)
    group = tx.load(key)
    if job is None or group is None or job.state not in ("running", "completed"):
        state = "gone" if job is None else job.state
        raise LeaseLostError(f"the job {claim_.job.id} is {state}")
    if group["token"] != claim_.token:
        raise LeaseLostError(f"document {claim_.group} of {claim_.job.id} was taken over")
    return job, key, group


def _read_to(job: Job, group: dict[str, Any], tokens: int) -> int:
    """The job's count of tokens read, once this group has got to `tokens`."""
    further: int = max(0, tokens - group["tokens"])
    group["tokens"] += further
    return job.tokens_read + further


def renew(tx: Transaction, claim_: Claim, lease_s: float, tokens: int, now_s: float) -> None:
    job, key, group = _held(tx, claim_)
    tokens_read = _read_to(job, group, tokens)
    tx.save(key, group | {"until_s": now_s + lease_s})
    if tokens_read != job.tokens_read:
        save_job(tx, job, tokens_read=tokens_read)


def commit(
    tx: Transaction,
    claim_: Claim,
    number: int,
    status: ItemStatus,
    result: dict[str, Any],
    tokens: Tokens,
    now_s: float,
    retention_s: float,
) -> int:
    job, key, group = _held(tx, claim_)
    item_key = part(b"i", job.id, number)
    item = tx.load(item_key)
    if item is None or item["group"] != claim_.group:
        raise LeaseLostError(f"item {number} is not part of document {claim_.group} of {job.id}")
    if item["seq"]:
        if item.get("token") == claim_.token:
            return int(item["seq"])
        raise LeaseLostError(f"item {number} of {job.id} has a result already")
    seq: int = job.seq + 1
    tx.save(item_key, item | {"seq": seq, "token": claim_.token})
    event = Committed(seq, number, item["id"], claim_.group, status, result, tokens, now_s)
    tx.save(part(b"e", job.id, seq), event)
    group["left"] -= 1
    group["failed"] = group.get("failed", 0) + (status == "failed")
    tokens_read = _read_to(job, group, tokens.prompt)
    if not group["left"]:
        tx.delete(part(b"p", job.id, claim_.group))
        if group["blob"] and not group["failed"]:
            for chunk in range(group["chunks"]):
                tx.delete(blob_key(group["blob"], chunk))
    tx.save(key, group)
    changed = save_job(
        tx,
        job,
        seq=seq,
        succeeded=job.succeeded + (status == "succeeded"),
        failed=job.failed + (status == "failed"),
        prompt_tokens=job.prompt_tokens + tokens.prompt,
        cached_tokens=job.cached_tokens + tokens.cached,
        completion_tokens=job.completion_tokens + tokens.completion,
        tokens_read=tokens_read,
        pace_s=_pace(job, now_s),
        committed_s=now_s,
    )
    if changed.left == 0:
        _finish(tx, changed, "completed", now_s, retention_s)
    return seq


def _pace(job: Job, now_s: float) -> float:
    since = job.committed_s or job.started_s or now_s
    step = min(max(0.0, now_s - since), _LONGEST_PACE_S)
    return step if not job.pace_s else job.pace_s + _PACE_WEIGHT * (step - job.pace_s)


def _finish(tx: Transaction, job: Job, state: str, now_s: float, retention_s: float) -> Job:
    tx.delete(part(b"r", job.id))
    return _expire_at(tx, job, now_s + retention_s, state=state, finished_s=now_s, seq=job.seq + 1)


def give_back(tx: Transaction, claim_: Claim, delay_s: float, counted: bool, now_s: float) -> None:
    key = part(b"g", claim_.job.id, claim_.group)
    group = tx.load(key)
    if group is None or group["token"] != claim_.token:
        return
    claims = group["claims"] - (not counted)
    # The token moves on: what this claim still has under way must not commit any more.
    changes = {"until_s": now_s + delay_s, "claims": claims, "token": group["token"] + 1}
    tx.save(key, group | changes)


def cancel(tx: Transaction, job_id: str, tenant: str, now_s: float, retention_s: float) -> Job:
    job = find(tx, job_id, tenant)
    if job.state != "running":
        return job
    return _finish(tx, job, "cancelled", now_s, retention_s)


def resume(
    tx: Transaction, job_id: str, tenant: str, retry_failed: bool, now_s: float
) -> tuple[Job, bool]:
    """The job, and whether there are more failed items to reopen by another call."""
    job = find(tx, job_id, tenant)
    reopened, more = 0, False
    if retry_failed and job.failed:
        reopened, more = _reopen(tx, job)
        job = dataclasses.replace(job, failed=job.failed - reopened)
    if job.state == "running":
        return (save_job(tx, job, seq=job.seq + 1) if reopened else job), more
    if not job.left:
        return job, more
    if job.expires_s is not None:
        tx.delete(expiry_key(job.expires_s, job_id))
    tx.put(part(b"r", job_id), b"1")
    changed = save_job(
        tx, job, state="running", finished_s=None, expires_s=None, seq=job.seq + 1, committed_s=None
    )
    return changed, more


def _reopen(tx: Transaction, job: Job) -> tuple[int, bool]:
    """Takes the results of some failed items away; how many, and whether others are left."""
    reopened, last = 0, None
    prefix = part(b"e", job.id) + b"/"
    while rows := tx.rows(prefix, after=last, limit=_PAGE):
        for key, _ in rows:
            last = key
            event = tx.load(key)
            if event["status"] != "failed":
                continue
            if reopened == _RETRY_SLICE:
                return reopened, True
            tx.delete(key)
            item_key = part(b"i", job.id, event["number"])
            tx.save(item_key, tx.load(item_key) | {"seq": 0})
            group_key = part(b"g", job.id, event["group"])
            group = tx.load(group_key)
            changes = {"left": group["left"] + 1, "failed": group["failed"] - 1, "claims": 0}
            if not group["left"]:
                # Nobody works on it: whoever held it has committed its last item.
                changes |= {"until_s": 0.0, "token": group["token"] + 1}
            tx.save(group_key, group | changes)
            tx.put(part(b"p", job.id, event["group"]), b"1")
            reopened += 1
    return reopened, False


def results(tx: Transaction, job_id: str, tenant: str, after: int, limit: int) -> list[Committed]:
    find(tx, job_id, tenant)
    start = part(b"e", job_id, max(0, after))
    rows = tx.rows(part(b"e", job_id) + b"/", after=start, limit=limit)
    found = []
    for key, _ in rows:
        row = tx.load(key)
        found.append(Committed(**(row | {"tokens": Tokens(**row["tokens"])})))
    return found
