"""What a document job asks for: the part of a job that the journal keeps without looking inside."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.auth.contracts import Caller, Limits
from penstock.errors import InvalidRequestError
from penstock.request import Sampling, StopRule
from protos.penstock.batch.v1 import batch_pb2

DOCUMENTS = "documents"
"""`Job.kind` of jobs that came through gRPC."""
TEMPLATE = "{document}\n\nQuestion: {question}"
LONGEST_TEMPLATE = 16_384
_LONGEST_KEY = 256
_MOST_METADATA = 16


@dataclass(frozen=True)
class DocumentSpec:
    """Checked wishes of a job, and who pays for it."""

    template: str = TEMPLATE
    instructions: str = ""
    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    cache_salt: str = ""
    reasoning_effort: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    caller: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, wire: batch_pb2.JobSpec, caller: Caller) -> DocumentSpec:
        """Raises InvalidRequestError for what no question could be asked with."""
        template = wire.template or TEMPLATE
        if template.count("{document}") != 1 or template.count("{question}") != 1:
            raise InvalidRequestError(
                "template must hold {document} and {question} once each", param="job.template"
            )
        for name, text, longest in (
            ("template", template, LONGEST_TEMPLATE),
            ("instructions", wire.instructions, LONGEST_TEMPLATE),
            ("idempotency_key", wire.idempotency_key, _LONGEST_KEY),
            ("cache_salt", wire.cache_salt, _LONGEST_KEY),
        ):
            if len(text) > longest:
                raise InvalidRequestError(
                    f"{name} is longer than {longest} characters", param=f"job.{name}"
                )
        metadata = dict(wire.metadata)
        if len(metadata) > _MOST_METADATA or any(
            len(k) > 64 or len(v) > 512 for k, v in metadata.items()
        ):
            raise InvalidRequestError(
                f"metadata takes at most {_MOST_METADATA} entries of 64 and 512 characters",
                param="job.metadata",
            )
        spec = cls(
            template=template,
            instructions=wire.instructions,
            max_tokens=wire.max_tokens,
            temperature=wire.temperature if wire.HasField("temperature") else 0.0,
            top_p=wire.top_p if wire.HasField("top_p") else 1.0,
            seed=wire.seed,
            stop=tuple(wire.stop),
            cache_salt=wire.cache_salt,
            reasoning_effort=wire.reasoning_effort,
            metadata=metadata,
            caller=caller_facts(caller),
        )
        # Both check their values.
        spec.sampling()
        spec.stop_rule(spec.max_tokens or 1)
        return spec

    @classmethod
    def read(cls, stored: dict[str, Any]) -> DocumentSpec:
        return cls(**(stored | {"stop": tuple(stored["stop"])}))

    def stored(self) -> dict[str, Any]:
        return asdict(self)

    def messages(self, document: str, question: str) -> list[dict[str, Any]]:
        """The conversation that asks `question`. Neither text is searched for placeholders."""
        before, _, after = self.template.partition("{document}")
        text = (
            before.replace("{question}", question)
            + document
            + after.replace("{question}", question)
        )
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*system, {"role": "user", "content": text}]

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def stop_rule(self, max_tokens: int) -> StopRule:
        return StopRule(max_tokens=max_tokens, strings=self.stop)


def caller_facts(caller: Caller) -> dict[str, Any]:
    """Who pays, as JSON: a job outlives the connection that brought it."""
    return {
        "key_id": caller.key_id,
        "name": caller.name,
        "limits": asdict(caller.limits),
    }


def caller_of(tenant: str, facts: dict[str, Any]) -> Caller:
    """With the limits that the key had when the job came."""
    limits = Limits(**facts.get("limits", {}))
    return Caller(tenant, facts.get("key_id", ""), facts.get("name", ""), limits=limits)
