"""Every metric of every process, declared here and nowhere else.

`docs/metrics.md` is made from this list (`python -m penstock.telemetry.table`); a test runs a
cluster and sees each of them move, or reads in `still` why it cannot. Names and meanings follow
vLLM where it has the same thing. Longer than other files because it is one list.
"""

from __future__ import annotations

from penstock.errors import error_codes
from penstock.telemetry import buckets
from penstock.telemetry.metric import EVERY, WORKERS, Label, Metric, Process

_FRONT: tuple[Process, ...] = ("front",)
_PREFILL: tuple[Process, ...] = ("prefill",)
_DECODE: tuple[Process, ...] = ("decode",)
_STORE: tuple[Process, ...] = ("store",)

OUTCOMES = ("stop", "length", "cancelled", "refused", "failed")
ENDPOINTS = ("chat", "completions", "batch")
ERROR_CODES = error_codes()
MISS_REASONS = (
    "new",
    "evicted",
    "no_state",
    "cheaper",
    "lost",
    "damaged",
    "unreachable",
    "tail",
)
RESUME_WAYS = ("state", "replay", "nothing")
DIRECTIONS = ("put", "get")
_MOST_ROUTES = 48
_MOST_STATUSES = 32
_MOST_DRAFT_PLACES = 16

# Of each process

PROCESS_MEMORY = Metric(
    "process_resident_memory_bytes", "gauge", EVERY, "Resident memory of the process"
)
PROCESS_CPU = Metric("process_cpu_seconds_total", "counter", EVERY, "User and system CPU time")
PROCESS_FDS = Metric("process_open_fds", "gauge", EVERY, "Open file descriptors")
PROCESS_START = Metric(
    "process_start_time_seconds", "gauge", EVERY, "When the process started, Unix time"
)

# Front: requests as clients see them

REQUESTS = Metric(
    "requests_total",
    "counter",
    _FRONT,
    "Requests by how they ended: `stop` and `length` are answers, `refused` errors below 500",
    (Label("endpoint", ENDPOINTS), Label("outcome", OUTCOMES)),
)
RESPONSES = Metric(
    "http_responses_total",
    "counter",
    _FRONT,
    "HTTP responses; `route` is the path's pattern, `other` where nothing lives",
    (Label("route", most=_MOST_ROUTES), Label("status", most=_MOST_STATUSES)),
)
SUCCESS = Metric(
    "request_success_total",
    "counter",
    _FRONT,
    "Requests answered to the end",
    (Label("finished_reason", ("stop", "length", "tool_calls")),),
    vllm="request_success_total",
)
FAILURES = Metric(
    "request_failures_total",
    "counter",
    _FRONT,
    "Requests that ended in an error, refused ones included, by the error's code",
    (Label("code", ERROR_CODES, listed_in="penstock/errors.py"),),
)
REQUESTS_RUNNING = Metric("requests_running", "gauge", _FRONT, "Requests in this front process")
REQUESTS_LIMIT = Metric(
    "requests_limit", "gauge", _FRONT, "Most requests at once here; one more is answered with 429"
)
TTFT = Metric(
    "time_to_first_token_seconds",
    "histogram",
    _FRONT,
    "Arrival of the request to the first text of its answer",
    buckets=buckets.FIRST_TOKEN_S,
    vllm="time_to_first_token_seconds",
)
ITL = Metric(
    "inter_token_latency_seconds",
    "histogram",
    _FRONT,
    "Between two pieces of an answer's text",
    buckets=buckets.TOKEN_S,
    also=("inter_token_seconds",),
    vllm="inter_token_latency_seconds",
)
FRONT_TOKEN = Metric(
    "front_token_seconds",
    "histogram",
    _FRONT,
    "A streamed event with tokens, from its reading off the decode worker's stream to its "
    "hand-over to the client's connection: what the front adds",
    buckets=buckets.OVERHEAD_S,
)
TPOT = Metric(
    "request_time_per_output_token_seconds",
    "histogram",
    _FRONT,
    "First to last text of an answer, divided by its tokens after the first",
    buckets=buckets.TOKEN_S,
    vllm="request_time_per_output_token_seconds",
)
E2E = Metric(
    "e2e_request_latency_seconds",
    "histogram",
    _FRONT,
    "Arrival to the last event, however the request ended",
    buckets=buckets.REQUEST_S,
    also=("request_seconds",),
    vllm="e2e_request_latency_seconds",
)
QUEUE_TIME = Metric(
    "request_queue_time_seconds",
    "histogram",
    _FRONT,
    "Wait for cache memory and a slot in a decode worker, before prefill starts",
    buckets=buckets.REQUEST_S,
    vllm="request_queue_time_seconds",
)
PREFILL_TIME = Metric(
    "request_prefill_time_seconds",
    "histogram",
    _FRONT,
    "From that grant to the first token: prefill's own queue, restore, compute, hand-over",
    buckets=buckets.REQUEST_S,
    vllm="request_prefill_time_seconds",
)
DECODE_TIME = Metric(
    "request_decode_time_seconds",
    "histogram",
    _FRONT,
    "First to last token",
    buckets=buckets.REQUEST_S,
    vllm="request_decode_time_seconds",
)
INFERENCE_TIME = Metric(
    "request_inference_time_seconds",
    "histogram",
    _FRONT,
    "Prefill and decode time together",
    buckets=buckets.REQUEST_S,
    vllm="request_inference_time_seconds",
)
ENCODE_TIME = Metric(
    "encode_seconds",
    "histogram",
    _FRONT,
    "Body to token ids: parsing, chat template, tokenizer",
    buckets=buckets.FINE_S,
)
REQUEST_PROMPT_TOKENS = Metric(
    "request_prompt_tokens",
    "histogram",
    _FRONT,
    "Prompt length of each answered request",
    buckets=buckets.TOKENS,
    also=("prompt_tokens_per_request",),
    vllm="request_prompt_tokens",
)
REQUEST_GENERATION_TOKENS = Metric(
    "request_generation_tokens",
    "histogram",
    _FRONT,
    "Answer length of each answered request",
    buckets=buckets.TOKENS,
    vllm="request_generation_tokens",
)
REQUEST_MAX_TOKENS = Metric(
    "request_params_max_tokens",
    "histogram",
    _FRONT,
    "Longest answer that each answered request allowed",
    buckets=buckets.TOKENS,
    vllm="request_params_max_tokens",
)
REQUEST_N = Metric(
    "request_params_n",
    "histogram",
    _FRONT,
    "Choices that each answered request asked for, of all its prompts",
    buckets=(1.0, 2.0, 5.0, 10.0, 20.0),
    vllm="request_params_n",
)
PROMPT_TOKENS = Metric(
    "prompt_tokens_total",
    "counter",
    _FRONT,
    "Prompt tokens of answered requests, cached ones included",
    also=("prefix_cache_queries_total",),
    vllm="prompt_tokens_total",
)
CACHED_TOKENS = Metric(
    "prompt_tokens_cached_total",
    "counter",
    _FRONT,
    "Prompt tokens that were restored from the store, not computed",
    also=("prefix_cache_hits_total",),
    vllm="prefix_cache_hits_total",
)
GENERATION_TOKENS = Metric(
    "generation_tokens_total",
    "counter",
    _FRONT,
    "Answer tokens of answered requests",
    also=("completion_tokens_total",),
    vllm="generation_tokens_total",
)
LIVE_WORKERS = Metric(
    "workers",
    "gauge",
    _FRONT,
    "Workers in the directory",
    (Label("role", WORKERS), Label("state", ("ready", "draining"))),
)
UNREACHABLE = Metric(
    "workers_unreachable",
    "gauge",
    _FRONT,
    "1 while this front cannot read the directory of workers, else 0",
    still="it is 1 only while the store node is away",
)
SCRAPE_FAILURES = Metric(
    "scrape_failures_total",
    "counter",
    _FRONT,
    "Workers and stores that did not tell their metrics in time",
    still="all processes answer",
)

PREFILL_FAILOVERS = Metric(
    "prefill_failovers_total",
    "counter",
    _FRONT,
    "Times that a request tried prefill once more, because a worker or the store failed",
    still="nothing fails",
)
DECODE_FAILOVERS = Metric(
    "decode_failovers_total",
    "counter",
    _FRONT,
    "Times that a request tried decode once more, because a worker or the store failed",
    still="nothing fails",
)
FAILOVER_RECOMPUTED = Metric(
    "prefill_failover_lost_tokens_total",
    "counter",
    _FRONT,
    "Prompt tokens that a failed prefill worker had committed and that its successor did not find",
    still="nothing fails",
)

# Front: batch jobs

BATCH_RUNNING = Metric(
    "batch_claims_running",
    "gauge",
    _FRONT,
    "Pieces of batch jobs in work in this front: a document with its questions, or one line",
)
BATCH_ITEMS = Metric(
    "batch_items_total",
    "counter",
    _FRONT,
    "Results of batch jobs that this front committed: answers, and questions given up",
    (Label("outcome", ("succeeded", "failed")),),
)
BATCH_TOKENS = Metric(
    "batch_tokens_total",
    "counter",
    _FRONT,
    "Tokens of those results: of prompts `computed` and `cached`, of answers `completion`",
    (Label("kind", ("computed", "cached", "completion")),),
)
BATCH_RETRIES = Metric(
    "batch_retries_total",
    "counter",
    _FRONT,
    "Pieces of batch jobs given back to be tried again",
    still="nothing fails",
)

# Workers of both roles

WORKER_PID = Metric("worker_pid", "gauge", WORKERS, "Process id")
WORKER_RUNNING = Metric(
    "worker_running",
    "gauge",
    WORKERS,
    "Requests that hold a slot and cache memory",
    also=("num_requests_running",),
    vllm="num_requests_running",
)
WORKER_QUEUED = Metric(
    "worker_queued",
    "gauge",
    WORKERS,
    "Requests that wait for a slot or for cache memory",
    also=("num_requests_waiting",),
    vllm="num_requests_waiting",
)
WORKER_QUEUED_TOKENS = Metric(
    "worker_queued_tokens",
    "gauge",
    WORKERS,
    "Prefill: prompt tokens still to compute. Decode: tokens of context held",
)
WORKER_CAPACITY = Metric(
    "worker_capacity_bytes", "gauge", WORKERS, "Cache memory for sequences in all"
)
WORKER_USED = Metric("worker_used_bytes", "gauge", WORKERS, "Cache memory that requests hold")
WORKER_RESERVED = Metric(
    "worker_reserved_bytes", "gauge", WORKERS, "The same, as reserved by admission"
)
KV_USAGE = Metric(
    "kv_cache_usage_perc",
    "gauge",
    WORKERS,
    "Used part of the cache memory, 0 to 1",
    vllm="kv_cache_usage_perc",
)
WORKER_DRAINING = Metric(
    "worker_draining",
    "gauge",
    WORKERS,
    "1 while the worker takes no new requests",
    still="a worker drains only when it is stopped or replaced",
)
WORKER_BYTES_PER_TOKEN = Metric(
    "worker_kv_bytes_per_token", "gauge", WORKERS, "Bytes of KV in the store for one token"
)
WORKER_REQUESTS = Metric("worker_requests_total", "counter", WORKERS, "Requests taken in")
WORKER_FAILED = Metric(
    "worker_requests_failed_total",
    "counter",
    WORKERS,
    "Requests that ended in an error",
    still="nothing fails",
)
WORKER_CANCELLED = Metric(
    "worker_requests_cancelled_total",
    "counter",
    WORKERS,
    "Requests whose caller hung up before the end",
)
TRANSFER_BYTES = Metric(
    "worker_kv_transfer_bytes_total",
    "counter",
    WORKERS,
    "Payload of KV objects sent to (`put`) and received from (`get`) the store",
    (Label("direction", DIRECTIONS),),
)
TRANSFER_OBJECTS = Metric(
    "worker_kv_transfer_objects_total",
    "counter",
    WORKERS,
    "KV objects sent to and received from the store; a put of what is there already counts too",
    (Label("direction", DIRECTIONS),),
)
TRANSFER_TIME = Metric(
    "worker_kv_transfer_seconds",
    "histogram",
    WORKERS,
    "`put`: encoding, sending and commit of one batch of objects. `get`: first to last byte of one"
    " object, without the wait until it was committed",
    (Label("direction", DIRECTIONS),),
    buckets.FINE_S,
)
DATA_FALLBACKS = Metric(
    "worker_kv_data_fallbacks_total",
    "counter",
    WORKERS,
    "Transfers that went on over gRPC: the data port was `unreachable`, all connections `busy`, the"
    " connection `cut` or `silent`, a chunk `damaged` or `garbage`, `tls` failed; `resting`: one of"
    " these a moment before; a writer could not write into the node's `memory`",
    (
        Label(
            "reason",
            (
                *("unreachable", "busy", "cut", "silent", "damaged", "garbage", "tls"),
                *("resting", "memory"),
            ),
        ),
    ),
    still="the data port can be reached",
)
INTEGRITY_FAILURES = Metric(
    "worker_kv_integrity_failures_total",
    "counter",
    WORKERS,
    "Objects that this worker refused because they did not verify",
    still="no object is damaged",
)
INDEX_LOOKUPS = Metric(
    "worker_index_lookups_total",
    "counter",
    WORKERS,
    "Lookups of ids: answered by the `index` alone, or by the store `node` for some or all",
    (Label("answered_by", ("index", "node")),),
)

# Prefill workers

PREFILL_COMPUTED = Metric(
    "worker_prefill_computed_tokens_total", "counter", _PREFILL, "Prompt tokens computed"
)
PREFILL_CACHED = Metric(
    "worker_prefill_cached_tokens_total", "counter", _PREFILL, "Prompt tokens restored"
)
PREFILL_MISSED = Metric(
    "worker_prefill_missed_tokens_total",
    "counter",
    _PREFILL,
    "Prompt tokens not restored, by reason: `new` no block of them in the store, as far as it"
    " knows; `evicted` they were there lately and had to make room; `no_state` blocks are there but"
    " no state to resume at; `cheaper` computing them was predicted to be faster; `lost` they"
    " vanished between look-up and attach; `damaged` they did not verify; `unreachable` the store"
    " did not answer; `tail` everything before them was there, they fill no block",
    (Label("reason", MISS_REASONS),),
)
RESTORES = Metric(
    "worker_restores_total",
    "counter",
    _PREFILL,
    "Prompts by the way they were resumed: from a `state`, by `replay` of the last tokens before"
    " it, or from `nothing`",
    (Label("way", RESUME_WAYS),),
)
FETCH_LATENCY = Metric(
    "worker_resume_fetch_latency_seconds",
    "gauge",
    _PREFILL,
    "What the resume rule has learnt: a restore's seconds whatever its size",
)
FETCH_BANDWIDTH = Metric(
    "worker_resume_fetch_bytes_per_second",
    "gauge",
    _PREFILL,
    "Likewise: payload fetched and attached in a second",
)
TOKEN_COST = Metric(
    "worker_resume_token_seconds",
    "gauge",
    _PREFILL,
    "Likewise: computing a prompt's first token, beside others of its chunk",
)
TOKEN_CONTEXT_COST = Metric(
    "worker_resume_token_context_seconds",
    "gauge",
    _PREFILL,
    "Likewise: what each token of context adds to computing a token",
)
PREFILL_RECOMPUTED = Metric(
    "worker_prefill_recomputed_tokens_total",
    "counter",
    _PREFILL,
    "Prompt tokens computed though the store had their block when it was put: what a worker lost in"
    " mid-prompt, a missing state or an exact replay cost",
)
PREFILL_REPAIRED = Metric(
    "worker_prefill_repaired_blocks_total",
    "counter",
    _PREFILL,
    "Blocks put again because the store lost them while their prompt was in work",
    still="the store loses nothing while a prompt is in work",
)
PREFILL_PUBLISHED = Metric(
    "worker_bytes_published_total", "counter", _PREFILL, "Payload that this worker committed first"
)
PREFILL_PENDING = Metric(
    "worker_pending_tokens", "gauge", _PREFILL, "Prompt tokens admitted or waiting, not computed"
)
PREFILL_QUEUE_TIME = Metric(
    "worker_prefill_queue_seconds",
    "histogram",
    _PREFILL,
    "Wait of a prompt for a slot and cache memory here",
    buckets=buckets.REQUEST_S,
)
RESTORE_TIME = Metric(
    "worker_restore_seconds",
    "histogram",
    _PREFILL,
    "Lookup, fetch and attach of a prompt's longest resumable prefix",
    buckets=buckets.FINE_S,
)
CHUNK_TIME = Metric(
    "worker_prefill_chunk_seconds",
    "histogram",
    _PREFILL,
    "One chunk in the model",
    buckets=buckets.FINE_S,
)
PUBLISH_EXPOSED_TIME = Metric(
    "worker_publish_exposed_seconds",
    "histogram",
    _PREFILL,
    "What publishing adds to a prompt: waits for it between chunks and after the last",
    buckets=buckets.FINE_S,
)

# Decode workers

DECODE_TOKENS = Metric(
    "worker_decode_generated_tokens_total", "counter", _DECODE, "Tokens drawn and handed out"
)
DECODE_STEPS = Metric("worker_decode_steps_total", "counter", _DECODE, "Steps of the batch")
DECODE_PROMPT_COMPUTED = Metric(
    "worker_decode_prompt_tokens_computed_total",
    "counter",
    _DECODE,
    "Prompt tokens that decode had to compute",
    still="promised to stay 0",
)
DECODE_ATTACHED = Metric(
    "worker_decode_attached_tokens_total", "counter", _DECODE, "Prompt tokens attached"
)
DECODE_REPLAYED = Metric(
    "worker_decode_replayed_tokens_total",
    "counter",
    _DECODE,
    "Answer tokens fed once more because another worker had absorbed them and is gone",
    still="no worker fails",
)
DECODE_PUBLISH_FAILURES = Metric(
    "worker_decode_publish_failures_total",
    "counter",
    _DECODE,
    "Tries to publish an answer's blocks that failed; they are tried again",
    still="the store answers",
)
DECODE_PAGES = Metric(
    "worker_pages", "gauge", _DECODE, "Blocks of context that running requests may grow to"
)
ATTACH_TIME = Metric(
    "worker_attach_seconds",
    "histogram",
    _DECODE,
    "From the grant until a prompt is attached whole; most of it is the wait for prefill",
    buckets=buckets.REQUEST_S,
)
STEP_TIME = Metric(
    "worker_decode_step_seconds",
    "histogram",
    _DECODE,
    "One step of the batch in the model, drafts and sampling included",
    buckets=buckets.FINE_S,
)
ITERATION_TOKENS = Metric(
    "worker_iteration_tokens",
    "histogram",
    _DECODE,
    "Tokens drawn in one step of the batch",
    buckets=tuple(float(b) for b in buckets.ITERATION_TOKENS),
    vllm="iteration_tokens_total",
)
EVIDENCE_REQUESTS = Metric(
    "worker_evidence_requests_total", "counter", _DECODE, "Answers that were asked for evidence"
)
EVIDENCE_SPANS = Metric(
    "worker_evidence_spans_total", "counter", _DECODE, "Spans of prompt that evidence named"
)
EVIDENCE_TIME = Metric(
    "worker_evidence_seconds_total",
    "counter",
    _DECODE,
    "Time that evidence took on the model's thread; compare with `worker_decode_step_seconds_sum`",
)
DRAFTS = Metric(
    "worker_spec_decode_num_drafts_total",
    "counter",
    _DECODE,
    "Drafts made",
    vllm="spec_decode_num_drafts_total",
)
DRAFT_TOKENS = Metric(
    "worker_spec_decode_num_draft_tokens_total",
    "counter",
    _DECODE,
    "Tokens drafted",
    vllm="spec_decode_num_draft_tokens_total",
)
DRAFT_ACCEPTED = Metric(
    "worker_spec_decode_num_accepted_tokens_total",
    "counter",
    _DECODE,
    "Draft tokens that stood",
    vllm="spec_decode_num_accepted_tokens_total",
)
DRAFT_ACCEPTED_AT = tuple(
    Metric(
        f"worker_spec_decode_num_accepted_tokens_per_pos_{place}_total",
        "counter",
        _DECODE,
        f"Draft tokens at place {place} that stood",
        vllm="spec_decode_num_accepted_tokens_per_pos_total",
        still="" if place < 2 else "drafts as long as this need a module that makes them",
    )
    for place in range(_MOST_DRAFT_PLACES)
)

# The store node

STORE_EPOCH = Metric("store_epoch", "gauge", _STORE, "Grows with each start of the node")
STORE_CAPACITY = Metric("store_capacity_bytes", "gauge", _STORE, "Budget of the memory tier")
STORE_USED = Metric("store_used_bytes", "gauge", _STORE, "Bytes of committed objects in memory")
STORE_RESERVED = Metric(
    "store_reserved_bytes", "gauge", _STORE, "Bytes set aside for objects being written"
)
STORE_OBJECTS = Metric("store_objects", "gauge", _STORE, "Committed objects")
STORE_LEASES = Metric("store_leases", "gauge", _STORE, "Leases on objects")
STORE_OWNERS = Metric("store_lease_owners", "gauge", _STORE, "Owners of leases: requests at work")
STORE_SUBSCRIBERS = Metric(
    "store_subscribers", "gauge", _STORE, "Mirrors that follow its changes", still="no mirror runs"
)
STORE_EVENTS = Metric(
    "store_events_total", "counter", _STORE, "Changes told to mirrors, or ready to be"
)
STORE_PUTS = Metric("store_open_puts", "gauge", _STORE, "Objects being written")
STORE_GETS = Metric("store_open_gets", "gauge", _STORE, "Reads under way")
STORE_EVICTIONS = Metric(
    "store_evictions_total",
    "counter",
    _STORE,
    "Objects evicted to make room",
    also=("store_evictions",),
)
STORE_INTEGRITY = Metric(
    "store_integrity_failures_total",
    "counter",
    _STORE,
    "Writes refused because their digest did not match",
    also=("store_integrity_failures",),
    still="no write is damaged",
)
STORE_INDEX = Metric(
    "store_index_healthy", "gauge", _STORE, "1 if the latest call to the index succeeded"
)
STORE_HITS = Metric(
    "store_hits_total", "counter", _STORE, "Objects asked for and served", also=("store_hits",)
)
STORE_MISSES = Metric(
    "store_misses_total",
    "counter",
    _STORE,
    "Objects asked for that were not there, nor committed within the reader's patience",
    also=("store_misses",),
)
STORE_IN = Metric(
    "store_received_bytes_total",
    "counter",
    _STORE,
    "Bytes committed by writers",
    also=("store_bytes_in",),
)
STORE_OUT = Metric(
    "store_sent_bytes_total", "counter", _STORE, "Bytes sent to readers", also=("store_bytes_out",)
)

STORE_DATA_CONNECTIONS = Metric(
    "store_data_connections",
    "gauge",
    _STORE,
    "Connections to the data port",
    still="objects below 64 KiB and workers on the node's host do not use it",
)
STORE_DATA_REFUSED = Metric(
    "store_data_refused_total",
    "counter",
    _STORE,
    "Connections to the data port that the node ended: another protocol (`magic`), no good"
    " `ticket`, failed `tls`, `silent` or `cut` peers, `damaged` chunks, `garbage`, or `full`",
    (
        Label(
            "reason",
            ("magic", "ticket", "tls", "silent", "cut", "damaged", "garbage", "full"),
        ),
    ),
    still="no stranger connects",
)

# The store node: disk tier

_NO_DISK = "it moves with a disk tier (`kvstore.disk_bytes`)"
_NO_BUCKET = "there is no object tier unless kvstore.object_url is set"
STORE_DISK_CAPACITY = Metric(
    "store_disk_capacity_bytes",
    "gauge",
    _STORE,
    "Live bytes that the disk tier may hold; 0: there is none",
    still=_NO_DISK,
)
STORE_DISK_USED = Metric(
    "store_disk_used_bytes",
    "gauge",
    _STORE,
    "Live bytes on disk",
    still=_NO_DISK,
)
STORE_DISK_FILES = Metric(
    "store_disk_file_bytes",
    "gauge",
    _STORE,
    "Size of the disk tier's files, holes included",
    still=_NO_DISK,
)
STORE_DISK_QUEUED = Metric(
    "store_disk_queued_bytes",
    "gauge",
    _STORE,
    "Bytes that wait to be written to disk",
    still=_NO_DISK,
)
STORE_DISK_OBJECTS = Metric(
    "store_disk_objects",
    "gauge",
    _STORE,
    "Objects on disk",
    still=_NO_DISK,
)
STORE_DISK_LEASES = Metric(
    "store_disk_leases",
    "gauge",
    _STORE,
    "Leases on objects on disk",
    still=_NO_DISK,
)
STORE_DISK_EVICTIONS = Metric(
    "store_disk_evictions_total",
    "counter",
    _STORE,
    "Objects evicted from disk",
    still=_NO_DISK,
)
STORE_DISK_HITS = Metric(
    "store_disk_hits_total",
    "counter",
    _STORE,
    "Objects served from disk",
    still=_NO_DISK,
)
STORE_DISK_WRITTEN = Metric(
    "store_disk_written_bytes_total",
    "counter",
    _STORE,
    "Bytes written to disk",
    still=_NO_DISK,
)
STORE_DISK_READ = Metric(
    "store_disk_read_bytes_total",
    "counter",
    _STORE,
    "Bytes read from disk",
    still=_NO_DISK,
)
STORE_DISK_SKIPPED = Metric(
    "store_disk_skipped_total",
    "counter",
    _STORE,
    "Objects that were not written because too many waited",
    still=_NO_DISK,
)
STORE_DISK_ERRORS = Metric(
    "store_disk_errors_total",
    "counter",
    _STORE,
    "Reads and writes of the disk that failed",
    still=_NO_DISK,
)
STORE_DISK_QUARANTINED = Metric(
    "store_disk_quarantined_total",
    "counter",
    _STORE,
    "Objects on disk that did not verify and are not used again",
    still=_NO_DISK,
)
STORE_OBJECT_CAPACITY = Metric(
    "store_object_capacity_bytes",
    "gauge",
    _STORE,
    "Bytes that the bucket may hold, those of other nodes included; 0: there is none",
    still=_NO_BUCKET,
)
STORE_OBJECT_USED = Metric(
    "store_object_used_bytes",
    "gauge",
    _STORE,
    "Bytes in the bucket, as far as this node knows",
    still=_NO_BUCKET,
)
STORE_OBJECT_QUEUED = Metric(
    "store_object_queued_bytes",
    "gauge",
    _STORE,
    "Bytes waiting for the bucket",
    still=_NO_BUCKET,
)
STORE_OBJECT_OBJECTS = Metric(
    "store_object_objects",
    "gauge",
    _STORE,
    "Objects in the bucket, as far as this node knows",
    still=_NO_BUCKET,
)
STORE_OBJECT_EVICTIONS = Metric(
    "store_object_evictions_total",
    "counter",
    _STORE,
    "Objects that this node deleted there to make room",
    still=_NO_BUCKET,
)
STORE_OBJECT_HITS = Metric(
    "store_object_hits_total",
    "counter",
    _STORE,
    "Objects read from the bucket",
    still=_NO_BUCKET,
)
STORE_OBJECT_WRITTEN = Metric(
    "store_object_written_bytes_total",
    "counter",
    _STORE,
    "Bytes written there",
    still=_NO_BUCKET,
)
STORE_OBJECT_READ = Metric(
    "store_object_read_bytes_total",
    "counter",
    _STORE,
    "Bytes read from there",
    still=_NO_BUCKET,
)
STORE_OBJECT_SKIPPED = Metric(
    "store_object_skipped_total",
    "counter",
    _STORE,
    "Objects worth keeping that were not written: the queue was full or the bucket failed",
    still=_NO_BUCKET,
)
STORE_OBJECT_ERRORS = Metric(
    "store_object_errors_total",
    "counter",
    _STORE,
    "Calls of the bucket that failed or took too long",
    still=_NO_BUCKET,
)
STORE_OBJECT_QUARANTINED = Metric(
    "store_object_quarantined_total",
    "counter",
    _STORE,
    "Objects in the bucket that did not verify; deleted",
    still=_NO_BUCKET,
)
STORE_OBJECT_RESTING = Metric(
    "store_object_resting",
    "gauge",
    _STORE,
    "1 while the bucket is left alone because it failed or was slow",
    still=_NO_BUCKET,
)

CATALOG: tuple[Metric, ...] = tuple(
    metric
    for value in list(globals().values())
    for metric in (value if isinstance(value, tuple) else (value,))
    if isinstance(metric, Metric)
)
"""All of them, in the order above."""


def of(process: Process) -> tuple[Metric, ...]:
    return tuple(metric for metric in CATALOG if process in metric.where)
