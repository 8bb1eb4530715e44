"""`penstock demo`: a long document through separate prefill and decode pools, every answer checked.

The document is made from a fresh random seed; the right answers stay in this process and never
travel. Everything else goes through the public HTTP endpoint, as any client would.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.launch import started
from penstock.errors import PenstockError
from penstock.tokenizer import Tokenizer, open_tokenizer
from training.documents import Document, Question, make_document, make_questions

_TIMEOUT_S = 600.0
_FACTS = 24
_EVIDENCE_LEAD = 10


@dataclass(frozen=True)
class Answer:
    """One question's outcome. Times in seconds, measured by the client."""

    question: str
    expected: str
    answer: str
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    total_s: float
    evidence: list[dict[str, Any]] = field(default_factory=list)
    evidence_text: str = ""

    @property
    def right(self) -> bool:
        return self.answer == self.expected

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True)
class Report:
    """What the demo measured; `--json` writes it."""

    seed: int
    document_tokens: int
    facts: int
    launcher: str
    startup_s: float
    kv_bytes_per_token: float
    decode_prompt_tokens_computed: float
    prefill_pid_differs_from_decode: bool
    answers: list[Answer]

    @property
    def right(self) -> int:
        return sum(a.right for a in self.answers)

    @property
    def all_right(self) -> bool:
        return self.right == len(self.answers)

    def to_json(self) -> str:
        data = asdict(self) | {"right": self.right, "all_right": self.all_right}
        for row, answer in zip(data["answers"], self.answers, strict=True):
            row |= {"right": answer.right, "cached_share": answer.cached_share}
        return json.dumps(data, indent=1)


def run(
    config: ClusterConfig,
    *,
    seed: int | None = None,
    questions: int = 8,
    unanswerable: int = 2,
    tokens: int = 32_768,
    json_path: Path | None = None,
) -> int:
    """Exit code: 0 only if every answer was right."""
    console = Console()
    seed = secrets.randbits(32) if seed is None else seed
    tokenizer = open_tokenizer(config.model.model)
    if tokenizer is None:
        raise PenstockError(f"the model '{config.model.model}' has no tokenizer.json")
    document = make_document(
        seed, tokens_at_least=tokens, facts=_FACTS, count=lambda text: len(tokenizer.encode(text))
    )
    asked = make_questions(document, seed, questions - unanswerable, unanswerable)
    size = len(tokenizer.encode(document.text))
    console.print(f"document: seed {seed}, {size:,} tokens, {len(document.facts)} facts")
    begun = time.monotonic()
    with started(config) as endpoint:
        startup_s = time.monotonic() - begun
        console.print(f"cluster ready at {endpoint.url} after {startup_s:.1f} s")
        with httpx.Client(base_url=endpoint.url, timeout=_TIMEOUT_S) as client:
            answers = _ask_all(client, config, document, asked, console, tokenizer)
            workers = client.get("/metrics").text
    report = Report(
        seed=seed,
        document_tokens=size,
        facts=len(document.facts),
        launcher=config.launcher.kind,
        startup_s=startup_s,
        kv_bytes_per_token=_metric(workers, "kv_bytes_per_token"),
        decode_prompt_tokens_computed=_metric(workers, "decode_prompt_tokens_computed_total"),
        prefill_pid_differs_from_decode=_pids(workers),
        answers=answers,
    )
    _print(console, report)
    if json_path is not None:
        json_path.write_text(report.to_json())
    return 0 if report.all_right else 1


def _ask_all(
    client: httpx.Client,
    config: ClusterConfig,
    document: Document,
    asked: list[Question],
    console: Console,
    tokenizer: Tokenizer,
) -> list[Answer]:
    ids = tokenizer.encode(document.text)
    answers = []
    for number, question in enumerate(asked, 1):
        prompt = f"{document.text}\n\n{question.text}"

        def show(text: str, number: int = number) -> None:
            if sys.stdout.isatty() or number == 1:
                console.print(f"  {text}", end="\r" if sys.stdout.isatty() else "\n")

        answer = ask(client, prompt, model=config.served_name, progress=show)
        answers.append(
            Answer(
                question=question.text,
                expected=question.answer,
                answer=answer["text"],
                prompt_tokens=answer["usage"]["prompt_tokens"],
                cached_tokens=answer["usage"]["prompt_tokens_details"]["cached_tokens"],
                ttft_s=answer["ttft_s"],
                total_s=answer["total_s"],
                evidence=answer["evidence"],
                evidence_text=_read_span(_heaviest(answer["evidence"]), ids, tokenizer),
            )
        )
        mark = "right" if answers[-1].right else f"WRONG, expected {question.answer}"
        console.print(f"{number}. {question.text} -> {answer['text']}  ({mark})")
    return answers


def ask(
    client: httpx.Client, prompt: str, *, model: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One streamed greedy chat completion with evidence: text, usage, times, evidence spans."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
        "evidence": True,
    }
    begun, ttft_s = time.monotonic(), 0.0
    text = ""
    usage: dict[str, Any] = {}
    evidence: list[dict[str, Any]] = []
    with client.stream("POST", "/v1/chat/completions", content=orjson.dumps(body)) as response:
        if response.status_code != 200:
            response.read()
            raise PenstockError(f"the request failed: {response.text[:300]}")
        for line in response.iter_lines():
            if line.startswith(":"):
                progress(line[1:].strip())
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = orjson.loads(line[6:])
            if "error" in event:
                raise PenstockError(f"the request failed: {event['error']['message']}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                delta = choice["delta"]
                evidence.extend(delta.get("evidence") or ())
                if delta.get("content"):
                    ttft_s = ttft_s or time.monotonic() - begun
                    text += delta["content"]
    total_s = time.monotonic() - begun
    return {
        "text": text,
        "usage": usage,
        "ttft_s": ttft_s or total_s,
        "total_s": total_s,
        "evidence": evidence,
    }


def _print(console: Console, report: Report) -> None:
    console = Console(width=max(console.width, 110))
    table = Table(title=f"seed {report.seed}: {report.right} of {len(report.answers)} right")
    for column in ("question", "answer", "expected", "first token", "cached", "evidence"):
        table.add_column(column, overflow="fold")
    for answer in report.answers:
        table.add_row(
            answer.question.removeprefix("Question: what is "),
            answer.answer,
            answer.expected if not answer.right else "right",
            f"{answer.ttft_s * 1e3:,.0f} ms",
            f"{answer.cached_tokens:,} of {answer.prompt_tokens:,} ({answer.cached_share:.1%})",
            answer.evidence_text,
        )
    console.print(table)
    later = [a.ttft_s for a in report.answers[1:]]
    if later:
        console.print(
            f"first question {report.answers[0].ttft_s:.2f} s to first token, later ones at most "
            f"{max(later):.2f} s ({max(later) / report.answers[0].ttft_s:.3f} of the first); "
            f"KV {report.kv_bytes_per_token:.1f} bytes per token; decode computed "
            f"{report.decode_prompt_tokens_computed:.0f} prompt tokens"
        )


def _heaviest(spans: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The span with the most attention of any token of the answer."""
    return max(spans, key=lambda span: span["mass"], default=None)


def _read_span(span: dict[str, Any] | None, ids: list[int], tokenizer: Tokenizer) -> str:
    """The document at a span and shortly before it: a compressed entry holds 8 tokens, a fact
    13.
    """
    if span is None:
        return "-"
    begin = max(0, span["start"] - _EVIDENCE_LEAD)
    text = " ".join(tokenizer.decode(ids[begin : span["end"]]).split())
    return f"{span['start']}-{span['end']}: {text}"


def _metric(exposition: str, name: str) -> float:
    """Highest sample of a metric in a Prometheus exposition, 0 if there is none."""
    values = [v for key, v in _samples(exposition) if key.partition("{")[0].endswith(name)]
    return max(values, default=0.0)


def _samples(exposition: str) -> list[tuple[str, float]]:
    """Every sample as (name with labels, value)."""
    lines = [line for line in exposition.splitlines() if line and not line.startswith("#")]
    return [(key, float(value)) for key, _, value in (line.rpartition(" ") for line in lines)]


def _pids(exposition: str) -> bool:
    """Whether prefill and decode workers report different process ids."""
    pids: dict[str, set[float]] = {"prefill": set(), "decode": set()}
    for key, value in _samples(exposition):
        for role, found in pids.items():
            if "_pid{" in key and f'role="{role}"' in key:
                found.add(value)
    return all(pids.values()) and not pids["prefill"] & pids["decode"]
