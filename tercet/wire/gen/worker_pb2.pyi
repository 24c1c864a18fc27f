from tercet.wire.gen import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Leg(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEG_UNSPECIFIED: _ClassVar[Leg]
    LEG_AGGREGATED: _ClassVar[Leg]
    LEG_PREFILL: _ClassVar[Leg]
    LEG_DECODE: _ClassVar[Leg]
    LEG_ENCODE: _ClassVar[Leg]
LEG_UNSPECIFIED: Leg
LEG_AGGREGATED: Leg
LEG_PREFILL: Leg
LEG_DECODE: Leg
LEG_ENCODE: Leg

class Command(_message.Message):
    __slots__ = ("start", "abort", "meet", "prove")
    START_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    PROVE_FIELD_NUMBER: _ClassVar[int]
    start: Start
    abort: Abort
    meet: Meet
    prove: Prove
    def __init__(self, start: _Optional[_Union[Start, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., meet: _Optional[_Union[Meet, _Mapping]] = ..., prove: _Optional[_Union[Prove, _Mapping]] = ...) -> None: ...

class Prove(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce", "proof")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    proof: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Meet(_message.Message):
    __slots__ = ("endpoints",)
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, endpoints: _Optional[_Iterable[str]] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("worker_id", "transport", "bandwidth", "latency_s", "fault")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    bandwidth: float
    latency_s: float
    fault: str
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., bandwidth: _Optional[float] = ..., latency_s: _Optional[float] = ..., fault: _Optional[str] = ...) -> None: ...

class TicketId(_message.Message):
    __slots__ = ("request_id", "attempt", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("digest", "tiles", "rows", "columns", "spans", "content")
    class Span(_message.Message):
        __slots__ = ("first", "count")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        first: int
        count: int
        def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    tiles: int
    rows: int
    columns: int
    spans: _containers.RepeatedCompositeFieldContainer[Image.Span]
    content: bytes
    def __init__(self, digest: _Optional[bytes] = ..., tiles: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Image.Span, _Mapping]]] = ..., content: _Optional[bytes] = ...) -> None: ...

class TraceContext(_message.Message):
    __slots__ = ("traceparent", "tracestate")
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    traceparent: str
    tracestate: str
    def __init__(self, traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("ticket", "leg", "token_ids", "prompt_tokens", "sampling", "timeout_s", "peer", "images", "trace", "prompt_logprobs")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ticket: TicketId
    leg: Leg
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: _inference_pb2.Sampling
    timeout_s: float
    peer: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    trace: TraceContext
    prompt_logprobs: int
    def __init__(self, ticket: _Optional[_Union[TicketId, _Mapping]] = ..., leg: _Optional[_Union[Leg, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ..., peer: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., trace: _Optional[_Union[TraceContext, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: TicketId
    def __init__(self, ticket: _Optional[_Union[TicketId, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "blocks_total", "blocks_free", "blocks_owned", "blocks_leased", "blocks_in_flight", "blocks_quarantined", "preemptions", "transfer_dropped", "transfer_refused", "transfer_corrupt", "pairs", "encoder_cache_queries", "encoder_cache_hits", "encoder_patches", "encoder_waiting", "embedding_blocks_total", "embedding_blocks_free", "embedding_blocks_quarantined", "embedding_bytes", "ranks_lost", "rank_losses", "spans_dropped")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_OWNED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LEASED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_DROPPED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_REFUSED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_PATCHES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_WAITING_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANKS_LOST_FIELD_NUMBER: _ClassVar[int]
    RANK_LOSSES_FIELD_NUMBER: _ClassVar[int]
    SPANS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_owned: int
    blocks_leased: int
    blocks_in_flight: int
    blocks_quarantined: int
    preemptions: int
    transfer_dropped: int
    transfer_refused: int
    transfer_corrupt: int
    pairs: _containers.RepeatedCompositeFieldContainer[Pair]
    encoder_cache_queries: int
    encoder_cache_hits: int
    encoder_patches: int
    encoder_waiting: int
    embedding_blocks_total: int
    embedding_blocks_free: int
    embedding_blocks_quarantined: int
    embedding_bytes: int
    ranks_lost: int
    rank_losses: int
    spans_dropped: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_owned: _Optional[int] = ..., blocks_leased: _Optional[int] = ..., blocks_in_flight: _Optional[int] = ..., blocks_quarantined: _Optional[int] = ..., preemptions: _Optional[int] = ..., transfer_dropped: _Optional[int] = ..., transfer_refused: _Optional[int] = ..., transfer_corrupt: _Optional[int] = ..., pairs: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., encoder_cache_queries: _Optional[int] = ..., encoder_cache_hits: _Optional[int] = ..., encoder_patches: _Optional[int] = ..., encoder_waiting: _Optional[int] = ..., embedding_blocks_total: _Optional[int] = ..., embedding_blocks_free: _Optional[int] = ..., embedding_blocks_quarantined: _Optional[int] = ..., embedding_bytes: _Optional[int] = ..., ranks_lost: _Optional[int] = ..., rank_losses: _Optional[int] = ..., spans_dropped: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "logprob", "top_logprobs", "finish_reason")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    finish_reason: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("entries",)
    class Entry(_message.Message):
        __slots__ = ("logprob", "top")
        LOGPROB_FIELD_NUMBER: _ClassVar[int]
        TOP_FIELD_NUMBER: _ClassVar[int]
        logprob: float
        top: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
        def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[PromptLogprobs.Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[PromptLogprobs.Entry, _Mapping]]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("finish_reason", "stop_token_id", "cached_tokens", "stages", "kv_bytes", "transport")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    stop_token_id: int
    cached_tokens: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    kv_bytes: int
    transport: str
    def __init__(self, finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., kv_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("cached_tokens", "stages", "kv_bytes", "transport")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    kv_bytes: int
    transport: str
    def __init__(self, cached_tokens: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., kv_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("ticket", "token", "finished", "rejected", "failed", "admitted", "prompt", "progress")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ticket: TicketId
    token: Token
    finished: Finished
    rejected: Rejected
    failed: Failed
    admitted: Admitted
    prompt: PromptLogprobs
    progress: Progress
    def __init__(self, ticket: _Optional[_Union[TicketId, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., prompt: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class Reports(_message.Message):
    __slots__ = ("reports", "load", "challenge")
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[Report]
    load: Load
    challenge: Challenge
    def __init__(self, reports: _Optional[_Iterable[_Union[Report, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., challenge: _Optional[_Union[Challenge, _Mapping]] = ...) -> None: ...
