"""Every queue in the tree with its bound: a table of docs/limits.md (`cluster.limits` prints it).

`tests/cluster/test_queues.py` finds each `Queue` and `deque` that the code makes and demands it
here; queues of another make (dictionaries, lists of waiters) are listed by hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One queue. `where` is FILE:NAME of what holds it."""

    where: str
    what: str
    bound: str
    when_full: str
    by_hand: bool = False
    """Not made of a class that the test knows."""


QUEUES = (
    # The front
    Line("cluster/failover/relay.py:queue", "progress of one request on its way to the API",
         "256 (`_QUEUE_EVENTS`)", "the worker's stream waits"),
    Line("cluster/api/choices.py:queue", "events of the answers of one response",
         "256 (`_QUEUE_EVENTS`)", "their generators wait"),
    Line("cluster/router.py:_peaks", "loads seen of late", "its `maxlen`", "the oldest goes"),
    Line("cluster/api/state.py:max_streams", "requests in progress in one front",
         "`front.max_streams`", "429 `overloaded`", by_hand=True),
    # Prefill
    Line("prefill/scheduler.py:_tickets", "prompts that wait or are read at one worker",
         "`prefill.max_queued` that wait, `prefill.max_running` with memory",
         "429, reason `queue_full`; before that `predicted_wait`", by_hand=True),
    Line("prefill/steps.py:outputs", "chunks read that one prompt's task has not fetched",
         "2 (`UNREAD_CHUNKS`)", "steps leave the prompt out"),
    Line("prefill/publisher.py:_queue", "chunks of one prompt that wait for the store",
         "2 (`QUEUE_CHUNKS`)", "the prompt waits, others do not"),
    Line("prefill/inflight.py:_leads", "blocks of the prompts in the line above",
         "their blocks", "as the line above", by_hand=True),
    # Decode
    Line("decode/credits.py:_line", "requests that wait for memory and a slot",
         "`decode.max_queued`, and those that rest", "429, reason `queue_full`; before that "
         "`predicted_wait`", by_hand=True),
    Line("decode/batch.py:_work", "attaching and exporting between two steps",
         "`decode.max_running` times 16 blocks (`WINDOW_BLOCKS`) and a few", "`attach` waits"),
    Line("decode/attach.py:loading", "blocks of one prompt that wait for the engine's thread",
         "16 (`WINDOW_BLOCKS`)", "the transfer waits"),
    Line("decode/stream.py:_ready", "tokens drawn that one request's task has not fetched",
         "`max_tokens` of the request", "the answer has ended", by_hand=True),
    # The store
    Line("kvstore/get_answers.py:_tickets", "tickets of one `Get` whose bytes go over the data "
         "port", "ids of one call (`MAX_IDS_PER_CALL`)", "`INVALID_ARGUMENT`"),
    Line("kvstore/put_offers.py:due", "offers of one `put_many` on their way",
         "bytes ahead (`_AHEAD_BYTES`)", "the writer waits"),
    Line("kvstore/data/fetch.py:_received", "objects of one transfer that nobody has taken",
         "bytes ahead, by `_waiting`", "reading from the connection waits"),
    Line("kvstore/data/deliver.py:_loads", "tickets of one `put_many` on one connection",
         "as `put_offers.due`", "the writer waits"),
    Line("kvstore/data/deliver.py:due", "those whose answer has not come", "as `put_offers.due`",
         "the writer waits"),
    Line("kvstore/arena.py:_freed", "regions freed by any thread, not yet sorted in",
         "objects of the store", "sorted in at the next allocation"),
    Line("kvstore/buffers.py:_freed", "memory freed by any thread, not yet sorted in",
         "`KEPT_BYTES`", "given back"),
    Line("kvstore/announcer.py:_backlog", "ids to announce after the index was lost",
         "objects of the node", "there are no more"),
    Line("kvstore/disk/tier.py:_queue", "objects on their way to the disk",
         "`kvstore.disk_queue_bytes`", "they stay in memory alone"),
    Line("kvstore/objects/tier.py:_queue", "objects on their way to the bucket",
         "`kvstore.object_queue_bytes`", "they are not written there"),
    # Processes
    Line("penstock/child.py:_tail", "last lines of a child's output", "40 (`_TAIL_LINES`)",
         "the oldest goes"),
    Line("bench/router.py:held", "requests in flight of a benchmark", "`IN_FLIGHT`",
         "the oldest ends"),
)  # fmt: skip


def table() -> str:
    """For docs/limits.md."""
    lines = [
        "## Queues",
        "",
        "Nothing waits without bound. `tests/cluster/test_queues.py` finds each queue in the code",
        "and demands it in `cluster/queues.py`, where this table comes from.",
        "",
        "| queue | what waits | bound | when it is full |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{line.where}` | {line.what} | {line.bound} | {line.when_full} |" for line in QUEUES
    ]
    return "\n".join(lines) + "\n"
