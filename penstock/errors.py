"""The one error tree of Penstock, and its one mapping to HTTP, OpenAI and gRPC.

Every error a user can meet is a `PenstockError`: one sentence that names the cause and, where there
is one, the next step. Rooms raise these; only the outermost layer (CLI, HTTP, gRPC servicer) maps
them.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of every expected failure. `message` is one sentence for the user, never a traceback."""

    http_status = 500
    openai_type = "server_error"
    code: str | None = "internal_error"
    grpc_code = "INTERNAL"
    retry_after_s: float | None = None
    reason: str | None = None
    """Why there was no room, in one word for programs: `queue_full`, `predicted_wait`, ..."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        if reason is not None:
            self.reason = reason


class UsageError(PenstockError):
    """Wrong command line or configuration: exit code 2."""

    http_status = 400
    openai_type = "invalid_request_error"
    code = "invalid_configuration"
    grpc_code = "INVALID_ARGUMENT"


class InvalidRequestError(PenstockError):
    """The request itself is wrong; sending it again unchanged cannot help."""

    http_status = 400
    openai_type = "invalid_request_error"
    code = "invalid_value"
    grpc_code = "INVALID_ARGUMENT"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested output does not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(PenstockError):
    http_status = 401
    openai_type = "invalid_request_error"
    code = "invalid_api_key"
    grpc_code = "UNAUTHENTICATED"


class PermissionDeniedError(PenstockError):
    """The key is valid and not allowed to do this."""

    http_status = 403
    openai_type = "invalid_request_error"
    code = "insufficient_scope"
    grpc_code = "PERMISSION_DENIED"


class ModelNotFoundError(PenstockError):
    http_status = 404
    openai_type = "invalid_request_error"
    code = "model_not_found"
    grpc_code = "NOT_FOUND"


class NotFoundError(PenstockError):
    """A job, file or item that is not there, or that belongs to another tenant."""

    http_status = 404
    openai_type = "invalid_request_error"
    code = "not_found"
    grpc_code = "NOT_FOUND"


class ConflictError(PenstockError):
    """It contradicts what is there already."""

    http_status = 409
    openai_type = "invalid_request_error"
    code = "conflict"
    grpc_code = "ALREADY_EXISTS"


class LeaseLostError(PenstockError):
    """Work was taken over by somebody else, or is not wanted any more; its result is dropped."""

    http_status = 409
    code = "lease_lost"
    grpc_code = "ABORTED"


class OverloadedError(PenstockError):
    """No credit now; the same request may succeed after `retry_after_s`."""

    http_status = 429
    openai_type = "rate_limit_error"
    code = "overloaded"
    grpc_code = "RESOURCE_EXHAUSTED"
    retry_after_s = 1.0


class RateLimitError(OverloadedError):
    """A limit of the caller's key: requests, tokens, or requests at once."""

    code = "rate_limit_exceeded"


class UnavailableError(PenstockError):
    """A part of the cluster that the request needs cannot be reached."""

    http_status = 503
    openai_type = "server_error"
    code = "unavailable"
    grpc_code = "UNAVAILABLE"
    retry_after_s = 1.0


class StoreUnavailableError(UnavailableError):
    code = "kv_store_unavailable"


class WorkerUnavailableError(UnavailableError):
    code = "worker_unavailable"


class IndexUnavailableError(UnavailableError):
    code = "index_unavailable"


class ClusterAuthError(UnavailableError):
    """A process of the cluster was refused by another. Never the fault of a client's request."""

    code = "cluster_auth"
    grpc_code = "UNAUTHENTICATED"


class JournalUnavailableError(UnavailableError):
    code = "journal_unavailable"


class FingerprintMismatchError(UnavailableError):
    """The request was routed for another model, format or numerics than this worker serves."""

    code = "fingerprint_mismatch"
    grpc_code = "FAILED_PRECONDITION"


class DeadlineError(PenstockError):
    http_status = 504
    openai_type = "server_error"
    code = "deadline_exceeded"
    grpc_code = "DEADLINE_EXCEEDED"


class CancelledError(PenstockError):
    """The client went away; nobody is left to read this."""

    http_status = 499
    code = "cancelled"
    grpc_code = "CANCELLED"


class BlockIntegrityError(PenstockError):
    """Bytes from the store are not what their id promises. They are never attached."""

    http_status = 503
    code = "kv_integrity"
    grpc_code = "DATA_LOSS"


class ModelLoadError(PenstockError):
    """A model folder that cannot be served: names the file, tensor or key."""

    code = "model_load_failed"
    grpc_code = "FAILED_PRECONDITION"


_BY_CODE: dict[str, type[PenstockError]] = {
    str(cls.code): cls
    for cls in (
        PenstockError,
        InvalidRequestError,
        ContextLengthError,
        AuthenticationError,
        PermissionDeniedError,
        ModelNotFoundError,
        NotFoundError,
        ConflictError,
        LeaseLostError,
        OverloadedError,
        RateLimitError,
        UnavailableError,
        StoreUnavailableError,
        WorkerUnavailableError,
        IndexUnavailableError,
        JournalUnavailableError,
        ClusterAuthError,
        FingerprintMismatchError,
        DeadlineError,
        CancelledError,
        BlockIntegrityError,
        ModelLoadError,
    )
}


def from_code(
    code: str,
    message: str,
    *,
    param: str | None = None,
    retry_after_s: float | None = None,
    reason: str | None = None,
) -> PenstockError:
    """Rebuild an error that crossed a wire as (code, message); an unknown code stays a server
    error.
    """
    return _BY_CODE.get(code, PenstockError)(
        message, param=param, code=code, retry_after_s=retry_after_s, reason=reason
    )


def error_codes() -> tuple[str, ...]:
    """Every code of the tree, for whoever counts errors by code."""
    return tuple(sorted({str(PenstockError.code), *_BY_CODE}))
