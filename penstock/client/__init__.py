"""The client of the batch service: sync and async, typed, needs grpcio and protobuf and no more.

from penstock.client import BatchClient, Document

with BatchClient("127.0.0.1:8001") as client:
    job = client.submit([Document.from_file("report.txt", ["What is the total?"])])
    for result in client.results(job.id, wait=True):
        print(result.document_id, result.text)
"""

from penstock.client.aio import AsyncBatchClient
from penstock.client.sync import BatchClient
from penstock.client.types import (
    Document,
    Job,
    JobOptions,
    JobState,
    Question,
    Result,
    ResultError,
    Usage,
)
from penstock.errors import PenstockError

__all__ = [
    "AsyncBatchClient",
    "BatchClient",
    "Document",
    "Job",
    "JobOptions",
    "JobState",
    "PenstockError",
    "Question",
    "Result",
    "ResultError",
    "Usage",
]
