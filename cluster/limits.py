"""Every bound on what comes in, where it is set, and the test that goes beyond it.

`python -m cluster.limits > docs/limits.md` writes the page; `tests/cluster/test_limits.py` holds it
to this list, and this list to the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic_core import PydanticUndefined

from cluster.queues import table
from penstock.settings import format_size

_HEAD = """# Limits

Made from `cluster/limits.py` by `python -m cluster.limits`; do not edit. Every row has a test that
goes beyond the limit.

A name with a dot is a setting (`front.max_streams`: `PENSTOCK_FRONT__MAX_STREAMS`, or
`front: {max_streams: ...}` in the file of `--config`); a name with a colon is a constant. Requests
and tokens of a key have limits of their own (`docs/security.md`).
"""
_FOOT = """
## What has no limit of ours

- **Behind Ray Serve's proxy** (`--launcher ray`) the rows marked * are not ours to set: its uvicorn
  runs inside Ray. Put an ingress in front of it that bounds heads, connections and slow readers.
  With `--launcher local` the front's own uvicorn has them (`cluster/connection.py`).
- A TLS handshake may take the 60 s of Python's event loops.
- JSON takes more memory once it is parsed: some 20 times a body's size for a body of empty lists.
  At most `front.encode_threads` bodies are parsed at once.
- What a client sends is never unpacked: no content encoding is accepted, and nothing in a request,
  a block or a model folder is compressed.
- Metadata of a gRPC call: gRPC's own 8 KiB.
"""


@dataclass(frozen=True)
class Limit:
    """One bound. `where` is `section.setting` or `module:CONSTANT`; `tests` are node ids."""

    what: str
    where: str
    beyond: str
    tests: str
    unit: str = ""
    ingress: bool = False
    """Not ours behind Ray Serve's proxy."""

    @property
    def value(self) -> Any:
        """As the code has it now. Raises AttributeError or KeyError if the name is gone."""
        module, colon, name = self.where.partition(":")
        if colon:
            return getattr(import_module(module), name)
        from cluster.config import ClusterConfig

        section, name = self.where.split(".")
        kind: Any = ClusterConfig.model_fields[section].annotation
        default = kind.model_fields[name].default
        return None if default is PydanticUndefined else default

    @property
    def shown(self) -> str:
        value = self.value
        if value is None:
            return "the model's"
        shown = format_size(value) if self.unit == "bytes" else f"{value:,g}"
        return shown + (f" {self.unit}" if self.unit not in ("", "bytes") else "")


_HOSTILE = "tests/cluster/test_hostile_http.py::"
_BOUNDS = "tests/cluster/test_limits.py::"
_WIRE = "tests/kvstore/test_wire_rules.py::"
_DATA = "tests/kvstore/data/test_transfer.py::"
_PASSAGE = "tests/cluster/routing/test_passage.py::"
_DISK = "tests/kvstore/disk/test_tier.py::"
_BUCKET = "tests/kvstore/test_object_tier.py::"

CONNECTION = (
    Limit("connections of one front", "front.max_connections", "503 `too_many_connections`",
          _HOSTILE + "test_more_connections_than_allowed_are_turned_away_and_the_rest_served",
          ingress=True),
    Limit("line and headers of a request", "front.max_header_bytes", "431 `headers_too_large`",
          _HOSTILE + "test_a_bomb_of_headers_ends_in_431", "bytes", ingress=True),
    Limit("time for them, also on a kept connection", "front.header_timeout_s",
          "408 `request_timeout`; silence: hung up",
          _HOSTILE + "test_headers_that_drip_end_in_408", "s", ingress=True),
    Limit("an answer that its client does not read", "front.write_stall_s",
          "hung up, the request cancelled",
          _HOSTILE + "test_an_answer_that_nobody_reads_ends_and_frees_its_request", "s",
          ingress=True),
    Limit("a body", "front.max_body_bytes", "413 `request_too_large`",
          "tests/cluster/api/test_bad_requests.py::test_a_body_over_the_limit_is_413", "bytes"),
    Limit("bodies of all requests in progress", "front.max_bodies_bytes", "429 `overloaded`",
          _HOSTILE + "test_bodies_together_stay_within_their_memory", "bytes"),
    Limit("time for a body", "front.body_timeout_s", "408 `request_timeout`",
          _HOSTILE + "test_a_body_that_drips_ends_in_408", "s"),
    Limit("and what extends it", "cluster.api.bodies:SLOWEST_BYTES_PER_S", "408 `request_timeout`",
          _HOSTILE + "test_a_large_body_that_keeps_coming_may_take_longer", "bytes/s"),
    Limit("nesting of JSON", "cluster.api.intake:MOST_DEPTH", "400 `invalid_json`",
          _HOSTILE + "test_deep_json_is_refused", "levels"),
)  # fmt: skip
REQUEST = (
    Limit("requests in progress in one front", "front.max_streams", "429 `overloaded`",
          "tests/cluster/api/test_bad_requests.py::test_one_request_too_many_is_429"),
    Limit("prompt and answer", "model.max_model_len", "400 `context_length_exceeded`",
          "tests/cluster/test_bad_input.py::test_bad_request_is_refused_with_its_cause", "tokens"),
    Limit("answers of one request", "cluster.api.schema:MOST_CHOICES", "400 `invalid_value`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name"),
    Limit("messages", "penstock.chat.messages:MOST_MESSAGES", "400 `invalid_value`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name"),
    Limit("tool calls of a message", "penstock.chat.messages:MOST_CALLS", "400 `invalid_value`",
          _BOUNDS + "test_a_message_with_too_many_tool_calls_is_refused"),
    Limit("stop strings", "penstock.request:MOST_STOPS", "400 `invalid_value`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name"),
    Limit("a stop string", "penstock.request:LONGEST_STOP", "400 `invalid_value`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name", "characters"),
    Limit("`X-Request-Id`", "cluster.api.scope:LONGEST_ID", "400 `invalid_request_id`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name", "characters"),
    Limit("`cache_salt`", "cluster.api.schema:LONGEST_SALT", "400 `invalid_value`",
          _BOUNDS + "test_one_more_than_allowed_is_refused_by_name", "characters"),
    Limit("an API key", "cluster.auth.authenticators:LONGEST_KEY", "401 `invalid_api_key`",
          _BOUNDS + "test_a_key_longer_than_any_is_refused_unread", "characters"),
    Limit("file of API keys", "cluster.auth.keys:MAX_FILE_BYTES", "refused at start, by name",
          "tests/cluster/auth/test_key_file.py::test_a_huge_file_is_not_read", "bytes"),
    Limit("a held-back answer (`grounding`)", "cluster.api.grounding:MOST_HELD_TOKENS",
          "the refusal in its place",
          "tests/cluster/api/test_grounding.py::"
          "test_an_answer_longer_than_any_evidence_is_not_kept_in_memory", "tokens"),
    Limit("time for a place at a decode worker", "front.admission_timeout_s", "429 `overloaded`",
          "tests/decode/test_trouble.py::test_waiting_for_credit_in_vain_is_an_overload", "s"),
    Limit("a predicted line at a prefill worker", "front.max_prefill_wait_s",
          "429 `overloaded`, reason `predicted_wait`",
          "tests/prefill/test_fair_worker.py::"
          "test_a_wait_that_is_predicted_to_be_too_long_is_refused_at_once", "s"),
    Limit("time without progress after a failure", "front.failover_timeout_s",
          "the failure's own error",
          "tests/cluster/test_store_broken.py::"
          "test_store_killed_in_mid_prefill_fails_every_request_with_its_cause", "s"),
    Limit("time for a request", "front.request_timeout_s", "504 `deadline_exceeded`",
          "tests/cluster/api/test_chat_api.py::test_the_deadline_ends_a_request", "s"),
)  # fmt: skip
INSIDE = (
    Limit("a worker's gRPC message", "penstock.rpc:MAX_MESSAGE_BYTES", "`RESOURCE_EXHAUSTED`",
          _BOUNDS + "test_a_message_to_a_worker_over_its_limit_is_refused", "bytes"),
    Limit("requests that wait at a decode worker", "decode.max_queued", "429 `overloaded`",
          "tests/decode/test_trouble.py::test_a_full_line_is_refused_with_a_time_to_come_back"),
    Limit("requests that wait at a prefill worker", "prefill.max_queued", "429 `overloaded`",
          "tests/prefill/test_prefill_worker.py::"
          "test_a_full_line_is_refused_with_a_time_to_come_back"),
    Limit("a place at a decode worker that nobody fills", "decode.grant_ttl_s",
          "429 `overloaded`, reason `grant_expired`",
          "tests/decode/test_trouble.py::test_a_grant_that_nobody_uses_goes_to_the_next", "s"),
    Limit("the store's memory", "kvstore.memory_bytes", "oldest unleased objects go",
          "tests/kvstore/test_policy.py::"
          "test_victims_are_idle_enough_and_never_more_than_needed", "bytes"),
    Limit("the store's disk", "kvstore.disk_bytes", "least valuable unleased objects go",
          _DISK + "test_a_lease_protects_an_object_that_is_only_on_disk", "bytes"),
    Limit("the bucket of the object tier", "kvstore.object_bytes", "the oldest unleased objects go",
          _BUCKET + "test_the_budget_holds_and_leased_objects_stay", "bytes"),
    Limit("what waits for the bucket", "kvstore.object_queue_bytes", "is not written there",
          _BUCKET + "test_the_queue_is_bounded_and_what_does_not_fit_is_counted", "bytes"),
    Limit("a read of the bucket", "kvstore.object_read_s", "a miss, and the tier rests",
          _BUCKET + "test_a_slow_bucket_costs_one_deadline_and_rests", "s"),
    Limit("what waits for the disk", "kvstore.disk_queue_bytes", "stays in memory alone",
          _DISK + "test_a_slow_disk_delays_nobody_and_its_queue_is_bounded", "bytes"),
    Limit("an object of the store", "kvstore.max_object_bytes", "refused",
          "tests/kvstore/test_catalog.py::test_what_nobody_can_take_is_refused_for_good", "bytes"),
    Limit("leases", "kvstore.max_leases", "`RESOURCE_EXHAUSTED`",
          _BOUNDS + "test_the_store_holds_no_more_leases_than_allowed"),
    Limit("time of a lease", "kvstore.max_lease_ttl_s", "shortened",
          _WIRE + "test_a_lease_longer_than_the_cap_is_shortened", "s"),
    Limit("wait for one object", "kvstore.max_wait_s", "answered as missing",
          _BOUNDS + "test_a_wait_beyond_the_longest_ends_as_missing", "s"),
    Limit("a gRPC message to the store", "kvstore.max_message_bytes", "`RESOURCE_EXHAUSTED`",
          _WIRE + "test_bounds_on_a_call", "bytes"),
    Limit("ids of one call", "kvstore.config:MAX_IDS_PER_CALL", "`INVALID_ARGUMENT`",
          _WIRE + "test_bounds_on_a_call"),
    Limit("ids of one verification", "kvstore.admin:VERIFY_IDS", "`INVALID_ARGUMENT`",
          "tests/kvstore/test_admin.py::test_a_call_verifies_and_lists_no_more_than_allowed"),
    Limit("an owner's name", "kvstore.node:MAX_OWNER_CHARS", "`INVALID_ARGUMENT`",
          _BOUNDS + "test_an_owner_with_too_long_a_name_is_refused", "characters"),
    Limit("objects being written", "kvstore.max_open_puts", "`RESOURCE_EXHAUSTED`",
          _WIRE + "test_one_write_and_one_read_too_many_are_refused"),
    Limit("reads", "kvstore.max_open_gets", "`RESOURCE_EXHAUSTED`",
          _WIRE + "test_one_write_and_one_read_too_many_are_refused"),
    Limit("a silent write", "kvstore.put_idle_s", "`DEADLINE_EXCEEDED`, bytes given back",
          _WIRE + "test_an_idle_put_gives_its_bytes_back", "s"),
    Limit("a reader that takes nothing", "kvstore.get_stall_s", "`DEADLINE_EXCEEDED`",
          _WIRE + "test_a_reader_that_reads_nothing_lets_go", "s"),
    Limit("connections to the data port", "kvstore.data_connections", "hung up; gRPC serves",
          _DATA + "test_more_connections_than_allowed_are_hung_up"),
    Limit("a first request on one", "kvstore.data.port:HELLO_S", "hung up",
          _DATA + "test_strangers_learn_nothing_and_are_counted", "s"),
    Limit("a ticket that nobody uses", "kvstore.server:TICKET_S", "what it reserved is given back",
          _DATA + "test_a_ticket_is_good_once_for_its_purpose_and_not_for_long", "s"),
    Limit("objects of one offer", "kvstore.offers:MOST_OFFERED", "`INVALID_ARGUMENT`",
          _DATA + "test_a_ticket_is_good_once_for_its_purpose_and_not_for_long"),
    Limit("data connections of one client", "kvstore.data.dialer:MOST_LINKS", "gRPC",
          _DATA + "test_many_at_once_come_whole_and_in_order"),
    Limit("a chunk on one", "kvstore.data.frames:CHUNK_BYTES", "hung up",
          "tests/kvstore/data/test_frames.py::"
          "test_a_large_object_goes_in_chunks_of_at_most_a_mebibyte", "bytes"),
    Limit("calls at once", "kvstore.max_concurrent_calls", "`RESOURCE_EXHAUSTED`",
          _BOUNDS + "test_the_store_answers_no_more_calls_at_once_than_allowed"),
    Limit("mirrors of a node", "kvstore.max_subscribers", "`RESOURCE_EXHAUSTED`",
          "tests/kvstore/test_mirror.py::"
          "test_who_has_no_token_cannot_subscribe_and_no_more_than_allowed_can"),
    Limit("changes that wait for a mirror", "kvstore.max_event_backlog",
          "cut, begins again with a snapshot",
          "tests/kvstore/test_mirror.py::"
          "test_a_subscriber_that_takes_too_little_is_cut_and_keeps_nothing"),
    Limit("workers in the directory", "kvstore.max_workers", "`RESOURCE_EXHAUSTED`",
          "tests/kvstore/test_directory.py::"
          "test_entries_that_nobody_could_call_are_refused_in_a_sentence"),
    Limit("decisions that a front remembers", "cluster.routing.told:MOST_DECISIONS",
          "the oldest is forgotten",
          _PASSAGE + "test_decisions_are_bounded_private_and_survive_json"),
    Limit("blocks and states that a front knows of", "cluster.routing.learnt:MOST_LEARNT_OBJECTS",
          "the older half is forgotten",
          _PASSAGE + "test_what_was_learnt_is_bounded_and_the_oldest_goes_first"),
    Limit("blocks whose workers `block-overlap` remembers",
          "cluster.routing.routed:MOST_SEEN_BLOCKS", "the longest unseen is forgotten",
          "tests/cluster/routing/test_mirror.py::"
          "test_what_was_routed_longest_ago_is_forgotten_first"),
)  # fmt: skip
_BATCH = "tests/cluster/batch/test_batch_service.py::"
_SIZES = _BATCH + "test_limits_of_size_and_number_hold"
BATCH = (
    Limit("an uploaded document", "batch.max_document_bytes", "`document_too_large`", _SIZES,
          "bytes"),
    Limit("all documents and questions of a job", "batch.max_job_bytes", "`job_too_large`", _SIZES,
          "bytes"),
    Limit("questions of a job, lines of a batch", "batch.max_questions", "`job_too_large`", _SIZES),
    Limit("a question", "cluster.batch.intake:LONGEST_QUESTION_BYTES", "`INVALID_ARGUMENT`",
          _BATCH + "test_an_id_or_a_question_that_is_too_long_is_named", "bytes"),
    Limit("an id", "cluster.batch.intake:LONGEST_ID", "`INVALID_ARGUMENT`",
          _BATCH + "test_an_id_or_a_question_that_is_too_long_is_named", "characters"),
    Limit("template, instructions", "cluster.batch.spec:LONGEST_TEMPLATE", "`INVALID_ARGUMENT`",
          _BATCH + "test_an_id_or_a_question_that_is_too_long_is_named", "characters"),
    Limit("submissions at once in one front", "batch.max_submissions", "`RESOURCE_EXHAUSTED`",
          _BATCH + "test_one_submission_too_many_is_refused_and_a_silent_one_ended"),
    Limit("silence of a submission", "batch.upload_idle_s", "`DEADLINE_EXCEEDED`",
          _BATCH + "test_one_submission_too_many_is_refused_and_a_silent_one_ended", "s"),
    Limit("watched jobs in one front", "batch.max_watchers", "`RESOURCE_EXHAUSTED`",
          _BATCH + "test_too_many_watchers_are_refused_in_words"),
    Limit("tries of a document", "batch.max_claims", "given up with the last reason",
          _BATCH + "test_what_always_fails_is_given_up_with_the_last_reason"),
    Limit("time for a document by reference", "batch.fetch_timeout_s", "tried again",
          "tests/cluster/batch/test_sources.py::test_the_web_below_the_allowed_place", "s"),
    Limit("a file of `/v1/files`", "batch.max_file_bytes", "413 `request_too_large`",
          "tests/cluster/batch/test_openai_batches.py::"
          "test_wrong_calls_are_errors_of_the_usual_form", "bytes"),
)  # fmt: skip
FOLDER = (
    Limit("a JSON file", "penstock.folder:LARGEST_JSON_BYTES", "refused by name",
          _BOUNDS + "test_files_of_a_model_folder_that_are_too_large_are_not_read", "bytes"),
    Limit("a text of `encoding/`", "penstock.chat.prompts:LARGEST_BYTES", "refused by name",
          _BOUNDS + "test_files_of_a_model_folder_that_are_too_large_are_not_read", "bytes"),
    Limit("a safetensors header", "model.shards:LARGEST_HEADER", "refused by name",
          _BOUNDS + "test_files_of_a_model_folder_that_are_too_large_are_not_read", "bytes"),
)  # fmt: skip
PARTS = (
    ("A connection and a body", CONNECTION),
    ("A request", REQUEST),
    ("Inside the cluster", INSIDE),
    ("Batch jobs and files", BATCH),
    ("A model folder", FOLDER),
)
LIMITS = tuple(limit for _, part in PARTS for limit in part)


def page() -> str:
    """The whole document."""
    lines = [_HEAD]
    for title, part in PARTS:
        lines += [f"## {title}", "", "| what | limit | name | beyond it |", "|---|---|---|---|"]
        for limit in part:
            mark = " *" if limit.ingress else ""
            lines.append(
                f"| {limit.what}{mark} | {limit.shown} | `{limit.where}` | {limit.beyond} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n\n" + table() + _FOOT


def main(write: Callable[[str], object] = print) -> int:
    write(page().rstrip("\n"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
