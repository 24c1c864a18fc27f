"""Every failure has a name. The whole tree:

    TercetError                     http  grpc
    ├── UserError                   400   INVALID_ARGUMENT     the request is wrong; never a worker's fault
    │   ├── InvalidRequest          400   INVALID_ARGUMENT
    │   ├── ContextTooLong          400   INVALID_ARGUMENT
    │   ├── BodyTooLarge            413   RESOURCE_EXHAUSTED
    │   ├── HeadTooLarge            431   RESOURCE_EXHAUSTED   a header, or all of them
    │   ├── UriTooLong              414   RESOURCE_EXHAUSTED
    │   ├── RequestTimeout          408   DEADLINE_EXCEEDED    the request's own bytes did not come in time
    │   ├── UnsupportedMedia        415   UNIMPLEMENTED        a content type or compression that is not read
    │   ├── UnknownUrl              404   UNIMPLEMENTED
    │   ├── MethodNotAllowed        405   UNIMPLEMENTED
    │   ├── ModelNotFound           404   NOT_FOUND
    │   ├── Unauthenticated         401   UNAUTHENTICATED      no API key, or one that is not known
    │   ├── RateLimited             429   RESOURCE_EXHAUSTED   its key has used what it may
    │   ├── UnknownRequest          404   NOT_FOUND            it is not, or no longer, in the gateway's record
    │   ├── ImageNotCached          404   NOT_FOUND            an image was named by its uuid alone; send it
    │   └── ImageNotFetched         400   INVALID_ARGUMENT     its address is refused, or gave no image in time
    ├── SpecError                   400   INVALID_ARGUMENT     the cluster spec is wrong: file, line, path
    │   └── UnsupportedSpec         400   UNIMPLEMENTED        sayable, but not built or not here
    ├── ModelError                  500   FAILED_PRECONDITION
    │   ├── ModelFileMissing        500   NOT_FOUND
    │   ├── ModelFileCorrupt        500   DATA_LOSS
    │   └── UnsupportedModel        500   UNIMPLEMENTED
    ├── Overloaded                  503   RESOURCE_EXHAUSTED   every candidate refused, or a queue is full
    ├── NoWorkers                   503   UNAVAILABLE          a role has no live worker, or an expert no live rank
    ├── DeadlineExceeded            504   DEADLINE_EXCEEDED
    ├── Cancelled                   499   CANCELLED            the client went away or asked for it
    ├── WorkerLost                  502   UNAVAILABLE          a worker died and no retry was left
    ├── WorkerDrained               503   UNAVAILABLE          its worker is taken away; the router goes on elsewhere
    ├── ImageForgotten              503   UNAVAILABLE          no longer cached; the router sends its file
    ├── EngineFault                 500   INTERNAL             this request's own step failed; the worker lives
    ├── TransferError               502   UNAVAILABLE          a KV handover failed
    │   ├── PeerDown                502   UNAVAILABLE
    │   │   ├── PeerUnreachable     502   UNAVAILABLE          no connection to it could be made
    │   │   └── RankLost            502   UNAVAILABLE          a rank that exchanges tokens died or fell silent
    │   ├── PeerMismatch            502   FAILED_PRECONDITION  other model, layout, version or cluster
    │   ├── ProtocolViolation       502   DATA_LOSS            bytes that are no frame of ours
    │   ├── LeaseExpired            502   DEADLINE_EXCEEDED
    │   └── DigestMismatch          502   DATA_LOSS
    ├── ClusterError                500   INTERNAL             Ray, ports, placement
    │   └── RayLost                 500   INTERNAL             Ray has died below a cluster that was served
    └── InternalError               500   INTERNAL             a fault of Tercet's own that no other name fits

An error crosses a wire as (code, message); `from_wire` rebuilds it. `code` is the class name in snake case.
"""

from __future__ import annotations

import logging
import re
from typing import ClassVar

log = logging.getLogger(__name__)


class TercetError(Exception):
    """Base of every error that Tercet raises on purpose."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None  # when the same request may be tried again, if that is known

    @classmethod
    def code(cls) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class UserError(TercetError):
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidRequest(UserError):
    pass


class ContextTooLong(UserError):
    pass


class BodyTooLarge(UserError):
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class HeadTooLarge(UserError):
    http_status = 431
    grpc_status = "RESOURCE_EXHAUSTED"


class UriTooLong(UserError):
    http_status = 414
    grpc_status = "RESOURCE_EXHAUSTED"


class RequestTimeout(UserError):
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class UnsupportedMedia(UserError):
    http_status = 415
    grpc_status = "UNIMPLEMENTED"


class UnknownUrl(UserError):
    http_status = 404
    grpc_status = "UNIMPLEMENTED"


class MethodNotAllowed(UserError):
    http_status = 405
    grpc_status = "UNIMPLEMENTED"


class ModelNotFound(UserError):
    http_status = 404
    grpc_status = "NOT_FOUND"


class Unauthenticated(UserError):
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class RateLimited(UserError):
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownRequest(UserError):
    http_status = 404
    grpc_status = "NOT_FOUND"


class ImageNotCached(UserError):
    http_status = 404
    grpc_status = "NOT_FOUND"


class ImageNotFetched(UserError):
    pass


class SpecError(TercetError):
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class UnsupportedSpec(SpecError):
    grpc_status = "UNIMPLEMENTED"


class ModelError(TercetError):
    grpc_status = "FAILED_PRECONDITION"


class ModelFileMissing(ModelError):
    grpc_status = "NOT_FOUND"


class ModelFileCorrupt(ModelError):
    grpc_status = "DATA_LOSS"


class UnsupportedModel(ModelError):
    grpc_status = "UNIMPLEMENTED"


class Overloaded(TercetError):
    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"


class NoWorkers(TercetError):
    http_status = 503
    grpc_status = "UNAVAILABLE"


class DeadlineExceeded(TercetError):
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(TercetError):
    http_status = 499
    grpc_status = "CANCELLED"


class WorkerLost(TercetError):
    http_status = 502
    grpc_status = "UNAVAILABLE"


class WorkerDrained(TercetError):
    http_status = 503
    grpc_status = "UNAVAILABLE"


class ImageForgotten(TercetError):
    http_status = 503
    grpc_status = "UNAVAILABLE"


class EngineFault(TercetError):
    pass


class TransferError(TercetError):
    http_status = 502
    grpc_status = "UNAVAILABLE"


class PeerDown(TransferError):
    pass


class PeerUnreachable(PeerDown):
    pass


class RankLost(PeerDown):
    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank  # None: rebuilt from a wire, where the message alone names it


class PeerMismatch(TransferError):
    grpc_status = "FAILED_PRECONDITION"


class ProtocolViolation(TransferError):
    grpc_status = "DATA_LOSS"


class LeaseExpired(TransferError):
    grpc_status = "DEADLINE_EXCEEDED"


class DigestMismatch(TransferError):
    grpc_status = "DATA_LOSS"


class ClusterError(TercetError):
    pass


class RayLost(ClusterError):
    pass


class InternalError(TercetError):
    pass


def _tree(root: type[TercetError]) -> dict[str, type[TercetError]]:
    found = {root.code(): root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(TercetError)  # code -> class


def from_wire(code: str, message: str) -> TercetError:
    """Rebuild an error that crossed a wire; an unknown code keeps its name in the message."""
    known = _BY_CODE.get(code)
    return known(message) if known else TercetError(f"{code}: {message}")


def as_named(error: Exception, request_id: str) -> TercetError:
    """What a boundary tells its client. An error that is not ours is a fault of ours: logged here, once."""
    if isinstance(error, TercetError):
        return error
    log.error("unexpected %s", type(error).__name__, exc_info=error, extra={"about": {"request_id": request_id}})
    return InternalError(f"unexpected {type(error).__name__}; the log has request {request_id}")
