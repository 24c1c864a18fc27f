"""The data types of a request's life cycle: plain frozen data, no behaviour beyond validation."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from tercet.errors import InvalidRequest, TercetError

GREEDY_BELOW = 1e-5  # temperature; as in vLLM; the draw would be greedy anyway, and the division may overflow
MOST_LOGPROBS = 20  # likeliest tokens per position, as in the OpenAI API


class Role(enum.StrEnum):
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, stop id or stop string
    LENGTH = "length"  # max_tokens or the context is full


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Ranges follow vLLM's SamplingParams; `validate` names what is out of range."""

    max_tokens: int = 16
    temperature: float = 1.0  # below GREEDY_BELOW it is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL (arXiv:1909.05858, section 4.1)
    presence_penalty: float = 0.0  # over output, as in the OpenAI API
    frequency_penalty: float = 0.0
    seed: int | None = None  # the gateway draws one if None, so that a retry samples the same tokens
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely tokens'
    prompt_logprobs: int | None = None  # likewise, for each token of the prompt but the first

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the next one's scores."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def stop_set(self) -> frozenset[int]:
        return frozenset(self.stop_token_ids)

    def validate(self) -> None:
        """Raises InvalidRequest naming the first field that is out of range."""
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ):
            if not math.isfinite(value) or not low <= value <= high:
                raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}, got {value}")
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0, got 0; for greedy decoding set temperature to 0")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise InvalidRequest(f"{name} must be from 0 to {MOST_LOGPROBS}, got {count}")


class TraceContext(NamedTuple):
    """A span, as W3C Trace Context names it to those who make spans below it."""

    parent: str  # traceparent
    state: str = ""  # tracestate

    @property
    def headers(self) -> dict[str, str]:
        return {"traceparent": self.parent} | ({"tracestate": self.state} if self.state else {})


@dataclass(frozen=True)
class GenerateRequest:
    """A tokenised request as the router gets it. `n > 1` and stop strings are the gateway's."""

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    deadline: float  # time.monotonic() of this host, seconds
    client: str = ""  # who asks; requests of one client wait for each other before they wait for others'
    images: tuple[PromptImage, ...] = ()  # in the order of the prompt
    trace: TraceContext | None = None  # None: it is not traced


TopLogprobs = tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
PromptScore = tuple[float, TopLogprobs]  # logprob of one prompt token, and the likeliest tokens at its position


@dataclass(frozen=True)
class PromptLogprobs:
    """Logprobs of a prompt but its first token. If asked for: once over all attempts, before the first new token."""

    entries: tuple[PromptScore, ...]  # [prompt tokens - 1]


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. `top_logprobs` holds (token id, logprob), most likely first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish: FinishReason | None = None  # set on the last token
    at: float = field(default_factory=time.monotonic, compare=False)  # when this process created or received it


STAGES = {  # in the order in which a request passes them; a stage's seconds are measured where it runs
    "queue": "arrival at the router until the first chunk is scheduled, waiting for a worker and failed tries included",
    "encode": "arrival at the worker that computes the prompt until the last image is encoded, beside text before it",
    "embed_transfer": "last image encoded until its embeddings are where the prompt is computed",
    "prefill": "first chunk scheduled, and all images there, until the first token is sampled",
    "transfer": "first token sampled until every KV byte has landed and its digest holds",
    "first_decode": "landed until the second token",
}
UNTIL_FIRST_TOKEN = ("queue", "encode", "embed_transfer", "prefill")  # stages that are over when it is sampled
StageSeconds = tuple[tuple[str, float], ...]  # (stage, seconds)


@dataclass(frozen=True)
class StageTimes:
    """How long a request spent in each stage that it has passed, and what was transferred for it."""

    seconds: StageSeconds = ()  # each stage once
    kv_bytes: int = 0  # KV bytes that crossed from prefill to decode
    transport: str = ""  # shm, tcp, ...; empty if no KV had to cross

    def of(self, stage: str) -> float:
        return dict(self.seconds).get(stage, 0.0)

    def with_stage(self, stage: str, seconds: float) -> StageTimes:
        return replace(self, seconds=(*self.seconds, (stage, seconds)))

    def longer(self, stage: str, seconds: float) -> StageTimes:
        """The same, with so much more in a stage."""
        return replace(self, seconds=tuple((name, s + seconds if name == stage else s) for name, s in self.seconds))


@dataclass(frozen=True)
class Progress:
    """How a request came to its second token, told with that: an answer may end before `Done`, at a stop string."""

    cached_tokens: int  # as in Done, the rest too
    times: StageTimes
    workers: tuple[tuple[str, str], ...] = ()
    attempts: int = 1


@dataclass(frozen=True)
class Done:
    """The last event of a request that succeeded."""

    finish_reason: FinishReason
    stop_token_id: int | None = None  # the end-of-sequence or stop id that ended it, if one did
    cached_tokens: int = 0  # prompt tokens that a prefix cache served (on the worker that computed the prompt)
    times: StageTimes = field(default_factory=StageTimes)
    workers: tuple[tuple[str, str], ...] = ()  # (role, worker id) of every leg, in order of use
    attempts: int = 1


@dataclass(frozen=True)
class PromptImage:
    """An image in a prompt."""

    digest: bytes  # sha256 of all that its embeddings follow from
    grid: tuple[int, int, int]  # tiles, rows and columns of tokens
    spans: tuple[tuple[int, int], ...]  # where its tokens stand in the prompt: first, count
    content: bytes = field(default=b"", repr=False)  # its file; empty where it need not, or need not yet, be encoded

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return sum(self.spans[-1])

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.spans)


class Ticket(NamedTuple):
    """Names one attempt at a request, and the handover of its KV to one incarnation of a decode worker."""

    request_id: str  # unique, unlike the id that a client gives
    attempt: int
    epoch: int  # of the worker that decodes

    @property
    def asked(self) -> str:
        """The request's id as its client knows it."""
        return self.request_id.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Leg:
    """The part of one attempt at a request that one worker does."""

    ticket: Ticket
    kind: Role  # which handler serves it
    token_ids: tuple[int, ...]  # the prompt, then the tokens that earlier attempts emitted
    num_prompt: int
    params: SamplingParams
    timeout_s: float
    peer: str = ""  # prefill, encode: transfer endpoint of the worker for the next stage
    images: tuple[PromptImage, ...] = ()  # in the order of the prompt; encode: those that it encodes
    trace: TraceContext | None = None  # of the attempt; None: it is not traced

    @property
    def size(self) -> int:
        """Tokens that are computed for it: of the prompt, or of its images."""
        return len(self.token_ids) or sum(image.tokens for image in self.images)


@dataclass(frozen=True)
class Admitted:
    """The worker that decodes has accepted the leg: it holds blocks or a place in the queue."""


@dataclass(frozen=True)
class Rejection:
    """The worker did not accept the leg."""

    reason: str


Outcome = Admitted | PromptLogprobs | TokenEvent | Progress | Done | Rejection | TercetError


@dataclass(frozen=True)
class PairState:
    """A prefill worker's connection to one decode worker, or an encode worker's to one that computes prompts."""

    worker_id: str  # of the other one
    transport: str = ""
    bandwidth: float = 0.0  # bytes per second, measured when the pair connected
    latency_s: float = 0.0  # round trip
    fault: str = ""  # why there is no connection


@dataclass(frozen=True)
class ExpertRows:
    """What a rank has computed of a mixture since its start. A row is one token at one expert in one layer."""

    rank: int
    experts: tuple[int, ...]  # that it has in some layer, with how many rows it has computed of each
    rows: tuple[int, ...]  # for requests of all ranks
    routed: tuple[int, ...]  # to each expert of the model, of the rank's own requests; tensor ranks share theirs
    sent_to: tuple[int, ...] = ()  # bytes to each rank of its stage, of rows to experts and back
    crossing_bytes: int = 0  # of them, to ranks that are on other nodes now, as far as its controller has said

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent_to)


@dataclass(frozen=True)
class Moves:
    """Of experts between the ranks of a worker, since it started."""

    epoch: int = 0  # of the placement: how many times a layer was placed anew
    live: bool = False  # a move is under way
    layers_left: int = 0  # of it, the one that is moved included; none while it tells shares of replicas
    moved_bytes: int = 0  # of weights that came from another rank
    done: int = 0  # moves that ended as asked
    failed: int = 0
    ended: int = 0  # number of the last one that has ended
    alarm: str = ""  # why the last one failed; empty: it did not
    seconds: float = 0.0  # that the last one took
    longest_pause_s: float = 0.0  # for which no step could begin, since layers were switched


@dataclass(frozen=True)
class Load:
    """A worker's load, sent with every report; an input to routing decisions."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_owned: int = 0
    blocks_leased: int = 0
    blocks_in_flight: int = 0
    blocks_quarantined: int = 0
    preemptions: int = 0  # sequences sent back to be recomputed, since the start
    transfer_dropped: int = 0  # messages that named no live ticket: late, duplicate, or of an old epoch
    transfer_refused: int = 0  # connections turned away or cut off: mismatch, garbage
    transfer_corrupt: int = 0  # units of KV that landed with a wrong digest and were fetched again
    encoder_cache_queries: int = 0  # images that embeddings were wanted of
    encoder_cache_hits: int = 0  # of these, those that were there, or on their way
    encoder_patches: int = 0  # that went through the tower
    encoder_waiting: int = 0  # images that are being encoded, or wait for it
    embedding_blocks_total: int = 0  # of the region that embeddings cross by
    embedding_blocks_free: int = 0
    embedding_blocks_quarantined: int = 0
    embedding_bytes: int = 0  # that have come from encode workers
    ranks_lost: int = 0  # that a worker of several goes on without
    rank_losses: int = 0  # since its start, those that are back included
    spans_dropped: int = 0  # of traces, that the collector did not take
    pairs: tuple[PairState, ...] = ()  # with workers for the next stage
    experts: tuple[ExpertRows, ...] = ()  # of each rank that has some; for the controller, and on no wire
    moves: Moves | None = None  # of experts; likewise
    transfer_endpoint: str = ""  # as in WorkerInfo, as it is now; likewise


@dataclass(frozen=True)
class Loading:
    """How far a worker is with its model."""

    what: str  # "bytes fetched" from a hub, then "tensors read"
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what}"


@dataclass(frozen=True)
class WorkerInfo:
    """Where a live worker is reached. `epoch` grows with every restart of the replica."""

    worker_id: str  # e.g. worker-1; it says nothing of the role
    role: Role
    epoch: int
    rpc_address: str  # host:port of its gRPC Worker service
    transfer_endpoint: str  # opaque blob of transfer/, for workers of the stage before; empty if there is none
    fingerprint: str  # model + layout; a pair must agree
    pid: int = 0
    node: str = ""
    kernels: str = ""  # what it computes with
