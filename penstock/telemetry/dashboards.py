"""What the Grafana dashboards show, as lists of panels; `grafana` makes JSON of them.

Every front tells the figures of all workers, so workers' series are joined by `max` over fronts
before they are added up. Longer than other files because it is one list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_RATE = "$__rate_interval"
_HERE = 'namespace=~"$namespace"'


@dataclass(frozen=True)
class Panel:
    """One graph. `queries`: (expression, legend)."""

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    most: float | None = None


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def quantiles(metric: str, *, by: str = "", where: str = _HERE) -> tuple[tuple[str, str], ...]:
    """Median, 95th and 99th percentile of a histogram of the front's."""
    kept = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({kept}) "
            f"(rate(penstock_{metric}_bucket{{{where}}}[{_RATE}])))",
            f"p{q * 100:g}{legend}",
        )
        for q in (0.5, 0.95, 0.99)
    )


def worker_quantiles(metric: str, *, q: float = 0.95, by: str = "role") -> tuple[str, str]:
    """A percentile over workers."""
    rate = f"rate(penstock_{metric}_bucket{{{_HERE}}}[{_RATE}])"
    joined = f"max by (worker, le, {by}) ({rate})"
    return f"histogram_quantile({q}, sum by (le, {by}) ({joined}))", f"p{q * 100:g} {{{{{by}}}}}"


def rate(metric: str, by: str = "", where: str = _HERE) -> str:
    """Growth in a second of a counter of the front's."""
    grouping = f"sum by ({by})" if by else "sum"
    return f"{grouping} (rate(penstock_{metric}{{{where}}}[{_RATE}]))"


def worker_rate(metric: str, by: str = "worker", where: str = _HERE) -> str:
    """Growth in a second of a counter of the workers', added over all but `by`."""
    labels = ", ".join(dict.fromkeys(["worker", *by.split(", ")]))
    joined = f"max by ({labels}) (rate(penstock_{metric}{{{where}}}[{_RATE}]))"
    return f"sum by ({by}) ({joined})"


def worker_gauge(metric: str, by: str = "role, worker") -> str:
    return f"max by ({by}) (penstock_{metric}{{{_HERE}}})"


def store(metric: str) -> str:
    return f"max (penstock_{metric}{{{_HERE}}})"


def store_rate(metric: str) -> str:
    return f"max (rate(penstock_{metric}{{{_HERE}}}[{_RATE}]))"


OVERVIEW = Dashboard(
    "penstock-overview",
    "Penstock / Overview",
    (
        (
            "What clients see",
            (
                Panel(
                    "Requests",
                    "By how they ended; refused ones are errors below 500.",
                    ((rate("requests_total", "outcome"), "{{outcome}}"),),
                    "reqps",
                ),
                Panel(
                    "Errors by code",
                    "Codes are those of the API's error bodies.",
                    ((rate("request_failures_total", "code"), "{{code}}"),),
                    "reqps",
                ),
                Panel(
                    "Requests in progress",
                    "Per front, with its limit.",
                    (
                        (f"max by (instance) (penstock_requests_running{{{_HERE}}})", "running"),
                        (f"max by (instance) (penstock_requests_limit{{{_HERE}}})", "limit"),
                    ),
                ),
                Panel(
                    "Time to first token",
                    "Arrival to the first text.",
                    quantiles("time_to_first_token_seconds"),
                    "s",
                ),
                Panel(
                    "Inter-token latency",
                    "Between two pieces of text.",
                    quantiles("inter_token_latency_seconds"),
                    "s",
                ),
                Panel(
                    "Request latency",
                    "Arrival to the last event.",
                    quantiles("e2e_request_latency_seconds"),
                    "s",
                ),
            ),
        ),
        (
            "Where the time goes",
            (
                Panel(
                    "Phases, 95th percentile",
                    "Queue: decode memory. Prefill: up to the first token. Decode: after it.",
                    tuple(
                        (quantiles(f"request_{phase}_time_seconds")[1][0], phase)
                        for phase in ("queue", "prefill", "decode")
                    ),
                    "s",
                ),
                Panel(
                    "Encoding",
                    "Body to token ids.",
                    quantiles("encode_seconds"),
                    "s",
                ),
                Panel(
                    "Tokens in a second",
                    "Prompt tokens computed, restored, and answer tokens.",
                    (
                        (worker_rate("worker_prefill_computed_tokens_total", "role"), "computed"),
                        (worker_rate("worker_prefill_cached_tokens_total", "role"), "restored"),
                        (worker_rate("worker_decode_generated_tokens_total", "role"), "generated"),
                    ),
                ),
                Panel(
                    "Prompt length",
                    "Of answered requests.",
                    quantiles("request_prompt_tokens"),
                ),
                Panel(
                    "Answer length",
                    "Of answered requests.",
                    quantiles("request_generation_tokens"),
                ),
                Panel(
                    "Batch jobs",
                    "Results in a second, and pieces of jobs that are tried again.",
                    (
                        (rate("batch_items_total", "outcome"), "{{outcome}}"),
                        (rate("batch_retries_total"), "tried again"),
                    ),
                    "ops",
                ),
                Panel(
                    "Tokens of batch jobs",
                    "In a second.",
                    ((rate("batch_tokens_total", "kind"), "{{kind}}"),),
                ),
                Panel(
                    "Prompt tokens from the cache",
                    "Restored, not computed.",
                    (
                        (
                            f"{rate('prompt_tokens_cached_total')}"
                            f" / ({rate('prompt_tokens_total')} > 0)",
                            "hit ratio",
                        ),
                    ),
                    "percentunit",
                    1.0,
                ),
            ),
        ),
    ),
)

WORKERS = Dashboard(
    "penstock-workers",
    "Penstock / Workers",
    (
        (
            "Both pools",
            (
                Panel(
                    "Workers",
                    "In the directory.",
                    ((worker_gauge("workers", "role, state"), "{{role}} {{state}}"),),
                ),
                Panel(
                    "Requests running and waiting",
                    "Per worker.",
                    (
                        (worker_gauge("num_requests_running"), "{{worker}} running"),
                        (worker_gauge("num_requests_waiting"), "{{worker}} waiting"),
                    ),
                ),
                Panel(
                    "Cache memory",
                    "Used part of each worker's.",
                    ((worker_gauge("kv_cache_usage_perc"), "{{worker}}"),),
                    "percentunit",
                    1.0,
                ),
                Panel(
                    "Resident memory",
                    "Of every process.",
                    (
                        (
                            worker_gauge("process_resident_memory_bytes", "role, worker, instance"),
                            "{{role}} {{worker}}",
                        ),
                    ),
                    "bytes",
                ),
                Panel(
                    "CPU",
                    "Cores in use, of every process.",
                    (
                        (
                            "max by (role, worker, instance) (rate("
                            f"penstock_process_cpu_seconds_total{{{_HERE}}}[{_RATE}]))",
                            "{{role}} {{worker}}",
                        ),
                    ),
                ),
                Panel(
                    "Failures and cancels",
                    "Requests in workers.",
                    (
                        (worker_rate("worker_requests_failed_total"), "{{worker}} failed"),
                        (worker_rate("worker_requests_cancelled_total"), "{{worker}} cancelled"),
                    ),
                    "reqps",
                ),
            ),
        ),
        (
            "Prefill",
            (
                Panel(
                    "Tokens computed",
                    "Per worker.",
                    ((worker_rate("worker_prefill_computed_tokens_total"), "{{worker}}"),),
                ),
                Panel(
                    "Tokens waiting",
                    "Admitted or in the line, not computed.",
                    ((worker_gauge("worker_pending_tokens"), "{{worker}}"),),
                ),
                Panel(
                    "One chunk in the model",
                    "95th percentile.",
                    (worker_quantiles("worker_prefill_chunk_seconds", by="worker"),),
                    "s",
                ),
                Panel(
                    "Restore and queue",
                    "95th percentile: looking up, fetching and attaching a prefix; the line.",
                    (
                        worker_quantiles("worker_restore_seconds", by="worker"),
                        (worker_quantiles("worker_prefill_queue_seconds", by="worker")[0], "queue"),
                    ),
                    "s",
                ),
                Panel(
                    "Publishing that shows",
                    "Time that a prompt waited for the store, 95th percentile.",
                    (worker_quantiles("worker_publish_exposed_seconds", by="worker"),),
                    "s",
                ),
            ),
        ),
        (
            "Decode",
            (
                Panel(
                    "Tokens generated",
                    "Per worker.",
                    ((worker_rate("worker_decode_generated_tokens_total"), "{{worker}}"),),
                ),
                Panel(
                    "One step of the batch",
                    "95th percentile.",
                    (worker_quantiles("worker_decode_step_seconds", by="worker"),),
                    "s",
                ),
                Panel(
                    "Tokens in a step",
                    "Median and 95th percentile.",
                    (
                        worker_quantiles("worker_iteration_tokens", q=0.5, by="worker"),
                        worker_quantiles("worker_iteration_tokens", by="worker"),
                    ),
                ),
                Panel(
                    "Drafts that stood",
                    "Accepted part of the drafted tokens.",
                    (
                        (
                            f"{worker_rate('worker_spec_decode_num_accepted_tokens_total')} / "
                            f"({worker_rate('worker_spec_decode_num_draft_tokens_total')} > 0)",
                            "{{worker}}",
                        ),
                    ),
                    "percentunit",
                    1.0,
                ),
                Panel(
                    "Attach",
                    "Grant until the prompt is attached whole, 95th percentile.",
                    (worker_quantiles("worker_attach_seconds", by="worker"),),
                    "s",
                ),
                Panel(
                    "Evidence",
                    "Its part of the time in steps.",
                    (
                        (
                            f"{worker_rate('worker_evidence_seconds_total')} / "
                            f"({worker_rate('worker_decode_step_seconds_sum')} > 0)",
                            "{{worker}}",
                        ),
                    ),
                    "percentunit",
                ),
            ),
        ),
    ),
)

CACHE = Dashboard(
    "penstock-cache",
    "Penstock / Cache and store",
    (
        (
            "Prompts",
            (
                Panel(
                    "Why tokens were not restored",
                    "new: never seen. evicted: had to make room. no_state: blocks without a state."
                    " cheaper: computed by choice. lost: vanished. damaged: did not verify."
                    " tail: too short for a block.",
                    (
                        (
                            worker_rate("worker_prefill_missed_tokens_total", "reason"),
                            "{{reason}}",
                        ),
                        (
                            worker_rate("worker_prefill_cached_tokens_total", "role"),
                            "restored",
                        ),
                    ),
                ),
                Panel(
                    "Computed again",
                    "Tokens whose block the store had already.",
                    ((worker_rate("worker_prefill_recomputed_tokens_total"), "{{worker}}"),),
                ),
                Panel(
                    "Lookups",
                    "Answered by the index alone, or with the store node's help.",
                    (
                        (
                            worker_rate("worker_index_lookups_total", "answered_by"),
                            "{{answered_by}}",
                        ),
                    ),
                    "ops",
                ),
            ),
        ),
        (
            "Transfer",
            (
                Panel(
                    "Bytes",
                    "Workers to and from the store.",
                    (
                        (
                            worker_rate("worker_kv_transfer_bytes_total", "role, direction"),
                            "{{role}} {{direction}}",
                        ),
                    ),
                    "Bps",
                ),
                Panel(
                    "Objects",
                    "Workers to and from the store.",
                    (
                        (
                            worker_rate("worker_kv_transfer_objects_total", "role, direction"),
                            "{{role}} {{direction}}",
                        ),
                    ),
                    "ops",
                ),
                Panel(
                    "Time of a transfer",
                    "95th percentile.",
                    (worker_quantiles("worker_kv_transfer_seconds", by="direction"),),
                    "s",
                ),
            ),
        ),
        (
            "Store node",
            (
                Panel(
                    "Memory tier",
                    "Committed and reserved bytes, and the budget.",
                    (
                        (store("store_used_bytes"), "used"),
                        (store("store_reserved_bytes"), "being written"),
                        (store("store_capacity_bytes"), "budget"),
                    ),
                    "bytes",
                ),
                Panel(
                    "Disk tier",
                    "Live bytes, its files, what waits to be written, and the budget.",
                    (
                        (store("store_disk_used_bytes"), "used"),
                        (store("store_disk_file_bytes"), "files"),
                        (store("store_disk_queued_bytes"), "waiting"),
                        (store("store_disk_capacity_bytes"), "budget"),
                    ),
                    "bytes",
                ),
                Panel(
                    "Disk traffic",
                    "Hits, evictions, and what was skipped or failed, in a second.",
                    (
                        (store_rate("store_disk_hits_total"), "hits"),
                        (store_rate("store_disk_evictions_total"), "evictions"),
                        (store_rate("store_disk_skipped_total"), "skipped"),
                        (store_rate("store_disk_errors_total"), "errors"),
                    ),
                    "ops",
                ),
                Panel(
                    "Objects and leases",
                    "Leased objects are not evicted.",
                    (
                        (store("store_objects"), "objects"),
                        (store("store_leases"), "leases"),
                        (store("store_lease_owners"), "requests with leases"),
                    ),
                ),
                Panel(
                    "Hits, misses, evictions",
                    "Objects in a second.",
                    (
                        (store_rate("store_hits_total"), "hits"),
                        (store_rate("store_misses_total"), "misses"),
                        (store_rate("store_evictions_total"), "evictions"),
                    ),
                    "ops",
                ),
                Panel(
                    "Traffic",
                    "Bytes committed and sent.",
                    (
                        (store_rate("store_received_bytes_total"), "received"),
                        (store_rate("store_sent_bytes_total"), "sent"),
                    ),
                    "Bps",
                ),
                Panel(
                    "Calls under way",
                    "Reads and objects being written.",
                    (
                        (store("store_open_gets"), "reads"),
                        (store("store_open_puts"), "writes"),
                    ),
                ),
                Panel(
                    "Health",
                    "The index answers (1); objects that did not verify.",
                    (
                        (store("store_index_healthy"), "index"),
                        (store_rate("store_integrity_failures_total"), "damaged writes"),
                        (
                            f"sum ({worker_rate('worker_kv_integrity_failures_total')})",
                            "damaged reads",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, WORKERS, CACHE)


def panels(dashboard: Dashboard) -> Iterator[Panel]:
    for _, row in dashboard.rows:
        yield from row
