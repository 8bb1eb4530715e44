"""Settings of batch jobs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from penstock.settings import Section, Size


class BatchSection(Section):
    """Batch jobs and uploaded files."""

    journal_url: str | None = Field(default=None, repr=False)
    """Where jobs live: sqlite:///PATH or a durable redis://. Default: a SQLite file of this port
    under $XDG_STATE_HOME (~/.local/state), made when the first job or file comes.
    """
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the gRPC batch service, on the front's host; none: not served."""
    sources: tuple[str, ...] = ()
    """Places that documents may be read from by reference, as beginnings of URIs:
    file:///data/, https://example.com/papers/, s3://bucket/prefix/. Default: none.
    """
    max_documents: int = Field(default=4, ge=1)
    """Documents in work at once in one front."""
    max_requests: int = Field(default=8, ge=1)
    """Questions in work at once in one front."""
    lease_s: float = Field(default=30.0, ge=1.0, le=600.0)
    """A document whose front has died is taken over after this."""
    pin_s: float = Field(default=120.0, ge=1.0, le=600.0)
    """How long the store keeps a document's KV after its front has died, for who takes it over."""
    max_claims: int = Field(default=20, ge=1)
    """Tries of a document before its questions are given up."""
    retention_s: float = Field(default=30 * 86_400.0, gt=0)
    """How long finished jobs and files are kept."""
    max_document_bytes: Size = Field(default=64 << 20, ge=1024)
    max_job_bytes: Size = Field(default=4 << 30, ge=1024)
    """All uploaded documents and questions of one job."""
    max_file_bytes: Size = Field(default=512 << 20, ge=1024)
    """Largest file of /v1/files."""
    max_questions: int = Field(default=100_000, ge=1)
    """Most questions of one job."""
    max_submissions: int = Field(default=16, ge=1)
    """Uploads at once in one front; one more is refused."""
    max_watchers: int = Field(default=256, ge=1)
    fetch_timeout_s: float = Field(default=60.0, gt=0)
    """Longest time for one document by reference."""
    upload_idle_s: float = Field(default=60.0, gt=0)
    """A submission that sends nothing for so long is ended."""
    price_uncached: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens that had to be computed, for a job's `cost`."""
    price_cached: float = Field(default=0.0, ge=0)
    price_output: float = Field(default=0.0, ge=0)

    @field_validator("sources", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """From a flag or the environment: separated by commas."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _sources_are_places(self) -> Self:
        for source in self.sources:
            scheme, separator, rest = source.partition("://")
            if not separator or not scheme or not rest or not source.endswith("/"):
                raise ValueError(
                    f"sources holds '{source}'; write places as file:///folder/, "
                    "https://host/path/ or s3://bucket/, with a slash at the end"
                )
        return self

    @property
    def has_prices(self) -> bool:
        return bool(self.price_uncached or self.price_cached or self.price_output)

    def cost(self, *, prompt: int, cached: int, completion: int) -> float | None:
        """In whatever currency the prices are; None without prices."""
        if not self.has_prices:
            return None
        computed = (prompt - cached) * self.price_uncached + cached * self.price_cached
        return (computed + completion * self.price_output) / 1e6

    def journal(self, front_port: int) -> str:
        """The journal's URL. A server is known by its port: started again there, it goes on."""
        if self.journal_url is not None:
            return self.journal_url
        return f"sqlite:///{_state_folder()}/penstock/journal-{front_port}.db"

    def streams(self, front_port: int) -> str:
        """Where streams are kept for clients that reconnect: the same Redis, or a file beside the
        journal's.
        """
        if self.journal_url is None:
            return f"sqlite:///{_state_folder()}/penstock/streams-{front_port}.db"
        if self.journal_url.startswith("sqlite:///"):
            return f"{self.journal_url}.streams"
        return self.journal_url


def _state_folder() -> str:
    return os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
