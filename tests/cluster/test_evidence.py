"""Evidence through HTTP with the shipped model: it is what the answer was read from.

Faithful: without the text of the heaviest span the answer is another one. And it is the same
evidence whichever way the tokens came: cold, from the store, in company, resumed in mid-answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.harness import Cluster, cluster
from tests.cluster.test_ledger import document
from training.documents import UNKNOWN, Question, make_questions


@pytest.fixture(scope="module")
def ledger() -> Iterator[Cluster]:
    with cluster("ledger") as c:
        yield c


def ask(c: Cluster, text: str, question: Question, **fields: Any) -> tuple[str, list[Any]]:
    """The answer and its evidence."""
    content = f"{text}\n\n{question.text}"
    settings = {"max_tokens": 8, "evidence": True} | fields
    got = c.chat([{"role": "user", "content": content}], **settings)
    return got.text, got.raw["choices"][0]["message"]["evidence"]


def without(text: str, span: dict[str, Any]) -> str:
    return text[: span["char_start"]] + text[span["char_end"] :]


def test_deleting_the_top_span_changes_the_answer_and_deleting_another_does_not(
    ledger: Cluster,
) -> None:
    changed, refused, controls, asked = 0, 0, 0, 0
    for seed in (21, 22, 23):
        made = document(seed, 1500, 8)
        for question in make_questions(made, seed, 6, 0):
            answer, evidence = ask(ledger, made.text, question)
            if answer != question.answer:
                continue
            asked += 1
            top = evidence[0]
            assert top["message"] == 0
            content = f"{made.text}\n\n{question.text}"
            assert content[top["char_start"] : top["char_end"]] == top["text"]
            # A fact at the document's end shares its entry with the question, which must stay.
            top["char_end"] = min(top["char_end"], len(made.text))
            again, _ = ask(ledger, without(made.text, top), question)
            changed += again != answer
            refused += again == UNKNOWN
            size = top["char_end"] - top["char_start"]
            fact = made.digits_at[question.name]
            elsewhere = (fact + len(made.text) // 2) % (len(made.text) - size)
            other = {"char_start": elsewhere, "char_end": elsewhere + size}
            controls += ask(ledger, without(made.text, other), question)[0] == answer
    print(
        f"{asked} answers: {changed} changed without their top span ({refused} to {UNKNOWN}), "
        f"{controls} stayed without another span of that length"
    )
    assert asked >= 16
    assert changed == asked
    assert refused >= asked - 2
    assert controls >= asked - 1


def test_a_refusal_has_next_to_no_evidence(ledger: Cluster) -> None:
    made = document(31, 1500, 8)
    for question in make_questions(made, 31, 0, 4):
        answer, evidence = ask(ledger, made.text, question)
        if answer == UNKNOWN:
            assert sum(span["weight"] for span in evidence) < 0.3


def test_a_stream_tells_each_tokens_spans_and_ends_with_the_answers(ledger: Cluster) -> None:
    made = document(41, 1500, 8)
    question = make_questions(made, 41, 1, 0)[0]
    answer, evidence = ask(ledger, made.text, question)
    content = f"{made.text}\n\n{question.text}"
    body = {
        "model": "ledger",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
        "evidence": True,
    }
    text, per_token, summary = "", [], None
    with ledger.client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("content") or ""
                summary = delta.get("answer_evidence", summary)
                per_token += [delta["evidence"]] if "evidence" in delta else []
    assert (text, summary) == (answer, evidence)
    # One list for each of the digits, before its text is complete, and each names the fact.
    assert len(per_token) >= len(answer)
    for spans in per_token:
        assert abs(spans[0]["char_start"] - made.digits_at[question.name]) < 24
        assert [s["mass"] for s in spans] == sorted((s["mass"] for s in spans), reverse=True)


def test_evidence_is_the_same_whichever_way_the_tokens_came(ledger: Cluster) -> None:
    made = document(51, 2500, 12)
    questions = make_questions(made, 51, 6, 0)
    # Cold each time: a salt of its own. Then all at once, over one cached prefix.
    alone = [ask(ledger, made.text, q, cache_salt=f"cold {n}") for n, q in enumerate(questions)]
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(lambda q: ask(ledger, made.text, q), questions))
    assert together == alone
    warm = [ask(ledger, made.text, q) for q in questions]
    assert warm == alone


def test_a_resumed_answer_has_the_evidence_of_the_undisturbed_one(ledger: Cluster) -> None:
    """What a failover does: another worker goes on from prompt and tokens so far."""
    made = document(61, 2500, 12)
    question = make_questions(made, 61, 1, 0)[0]
    content = f"{made.text}\n\n{question.text}"
    tokens = ledger.client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": content}]}
    ).json()["tokens"]

    def stream(prompt: list[int], most: int) -> list[tuple[int, list[Any]]]:
        body = {
            "model": "ledger",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": most,
            "stream": True,
            "evidence": True,
            "logits_digest": True,
        }
        found = []
        with ledger.client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    for token in choice.get("token_ids", ()):
                        places = [
                            (s["start"], s["end"], s["mass"]) for s in choice.get("evidence", ())
                        ]
                        found.append((token, places))
        return found

    whole = stream(tokens, 8)
    assert len(whole) >= 4
    for cut in (1, 2, 3):
        rest = stream([*tokens, *(token for token, _ in whole[:cut])], 8 - cut)
        assert rest == whole[cut:]


def test_strict_grounding_gives_the_models_answer_or_its_refusal(ledger: Cluster) -> None:
    made = document(71, 1500, 8)
    supported = withheld = 0
    for n, question in enumerate(make_questions(made, 71, 4, 1)):
        content = f"{made.text}\n\n{question.text}"
        messages = [{"role": "user", "content": content}]
        wishes: list[dict[str, Any]] = [{"max_tokens": 8}, {"max_tokens": 2}]
        # Drawn at random, the model makes codes up.
        wishes += [{"max_tokens": 8, "temperature": 2, "seed": 10 * n + k} for k in range(2)]
        for wish in wishes:
            free = ledger.chat(messages, **wish)
            strict = ledger.chat(messages, **wish, grounding="strict")
            told = strict.raw["choices"][0]["message"]["grounding"]
            assert strict.completion_tokens == free.completion_tokens
            if told["verdict"] == "withheld":
                withheld += 1
                assert strict.text == UNKNOWN
                assert free.text.strip(" .") != question.answer
            else:
                assert strict.text == free.text
            if told["verdict"] == "supported":
                supported += 1
                assert free.text.strip(" .") in made.text
    print(f"{supported} supported, {withheld} withheld")
    assert supported >= 4
    assert withheld >= 3
