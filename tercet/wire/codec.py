"""Converts between the types of core.py and the messages of proto/tercet/v1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from tercet.core import (
    Done,
    FinishReason,
    Leg,
    Load,
    PairState,
    Progress,
    PromptImage,
    PromptLogprobs,
    Role,
    SamplingParams,
    StageTimes,
    Ticket,
    TokenEvent,
    TopLogprobs,
    TraceContext,
)
from tercet.wire.gen import inference_pb2 as inf
from tercet.wire.gen import worker_pb2 as pb

NONCE_METADATA = "tercet-nonce"  # gRPC metadata key; its value is in hexadecimal
GATEWAY, WORKER = b"gateway", b"worker"  # whose proof it is

LEG_KINDS = {
    pb.LEG_AGGREGATED: Role.AGGREGATED,
    pb.LEG_PREFILL: Role.PREFILL,
    pb.LEG_DECODE: Role.DECODE,
    pb.LEG_ENCODE: Role.ENCODE,
}
LEG_NUMBERS = {kind: number for number, kind in LEG_KINDS.items()}
_FIELDS = inf.Sampling.DESCRIPTOR.fields_by_name
# Sampling parameter -> whether it may be absent; all but `prompt_logprobs`, which is a leg's, and no stop strings.
SAMPLING = {name: _FIELDS[name].has_presence for name in SamplingParams.__dataclass_fields__ if name in _FIELDS}
_APART = {"pairs", "experts", "moves", "transfer_endpoint"}  # the first is a message; the others are on no wire
_LOAD_FIELDS = tuple(name for name in Load.__dataclass_fields__ if name not in _APART)
_PAIR_FIELDS = tuple(PairState.__dataclass_fields__)


def ticket_to_proto(ticket: Ticket) -> pb.TicketId:
    return pb.TicketId(request_id=ticket.request_id, attempt=ticket.attempt, epoch=ticket.epoch)


def ticket_from_proto(message: pb.TicketId) -> Ticket:
    return Ticket(message.request_id, message.attempt, message.epoch)


def leg_to_proto(leg: Leg) -> pb.Command:
    return pb.Command(
        start=pb.Start(
            ticket=ticket_to_proto(leg.ticket),
            leg=LEG_NUMBERS[leg.kind],
            token_ids=leg.token_ids,
            prompt_tokens=leg.num_prompt,
            sampling=_sampling_to_proto(leg.params),
            timeout_s=leg.timeout_s,
            peer=leg.peer,
            prompt_logprobs=leg.params.prompt_logprobs,
            images=[_image_to_proto(image) for image in leg.images],
            trace=None if leg.trace is None else _trace_to_proto(leg.trace),
        )
    )


def leg_from_proto(start: pb.Start) -> Leg:
    params = sampling_from_proto(start.sampling)
    if start.HasField("prompt_logprobs"):
        params = replace(params, prompt_logprobs=start.prompt_logprobs)
    return Leg(
        ticket_from_proto(start.ticket),
        LEG_KINDS[start.leg],
        tuple(start.token_ids),
        start.prompt_tokens,
        params,
        start.timeout_s,
        start.peer,
        tuple(_image_from_proto(image) for image in start.images),
        TraceContext(start.trace.traceparent, start.trace.tracestate) if start.HasField("trace") else None,
    )


def _trace_to_proto(trace: TraceContext) -> pb.TraceContext:
    return pb.TraceContext(traceparent=trace.parent, tracestate=trace.state)


def _image_to_proto(image: PromptImage) -> pb.Image:
    tiles, rows, columns = image.grid
    spans = [pb.Image.Span(first=first, count=count) for first, count in image.spans]
    return pb.Image(digest=image.digest, tiles=tiles, rows=rows, columns=columns, spans=spans, content=image.content)


def _image_from_proto(message: pb.Image) -> PromptImage:
    spans = tuple((span.first, span.count) for span in message.spans)
    grid = (message.tiles, message.rows, message.columns)
    return PromptImage(message.digest, grid, spans, message.content)


def _sampling_to_proto(params: SamplingParams) -> inf.Sampling:
    return inf.Sampling(**{name: getattr(params, name) for name in SAMPLING})


def sampling_from_proto(message: inf.Sampling) -> SamplingParams:
    """Absent fields keep the defaults of SamplingParams."""
    given = [name for name, optional in SAMPLING.items() if not optional or message.HasField(name)]
    values = {name: getattr(message, name) for name in given}
    return SamplingParams(**values | {"stop_token_ids": tuple(message.stop_token_ids)})


def scores_to_proto(scores: PromptLogprobs) -> pb.PromptLogprobs:
    entries = [pb.PromptLogprobs.Entry(logprob=p, top=_top_to_proto(top)) for p, top in scores.entries]
    return pb.PromptLogprobs(entries=entries)


def scores_from_proto(message: pb.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(tuple((entry.logprob, _top_from_proto(entry.top)) for entry in message.entries))


def _top_to_proto(top: TopLogprobs) -> list[inf.TokenLogprob]:
    return [inf.TokenLogprob(token_id=t, logprob=p) for t, p in top]


def _top_from_proto(top: Iterable[inf.TokenLogprob]) -> TopLogprobs:
    return tuple((t.token_id, t.logprob) for t in top)


def token_to_proto(event: TokenEvent) -> pb.Token:
    token = pb.Token(token_id=event.token_id)
    if event.finish is not None:
        token.finish_reason = event.finish.value
    if event.logprob is not None:
        token.logprob = event.logprob
        token.top_logprobs.extend(_top_to_proto(event.top_logprobs))
    return token


def token_from_proto(token: pb.Token) -> TokenEvent:
    finish = FinishReason(token.finish_reason) if token.finish_reason else None
    if not token.HasField("logprob"):
        return TokenEvent(token.token_id, finish=finish)
    return TokenEvent(token.token_id, token.logprob, _top_from_proto(token.top_logprobs), finish)


def done_to_proto(done: Done) -> pb.Finished:
    return pb.Finished(
        finish_reason=done.finish_reason.value,
        stop_token_id=done.stop_token_id,
        cached_tokens=done.cached_tokens,
        **_times_to_proto(done.times),
    )


def done_from_proto(message: pb.Finished) -> Done:
    stop = message.stop_token_id if message.HasField("stop_token_id") else None
    return Done(FinishReason(message.finish_reason), stop, message.cached_tokens, _times_from_proto(message))


def progress_to_proto(progress: Progress) -> pb.Progress:
    return pb.Progress(cached_tokens=progress.cached_tokens, **_times_to_proto(progress.times))


def progress_from_proto(message: pb.Progress) -> Progress:
    return Progress(message.cached_tokens, _times_from_proto(message))


def _times_to_proto(times: StageTimes) -> dict[str, Any]:
    stages = [pb.Stage(name=name, seconds=seconds) for name, seconds in times.seconds]
    return {"stages": stages, "kv_bytes": times.kv_bytes, "transport": times.transport}


def _times_from_proto(message: pb.Finished | pb.Progress) -> StageTimes:
    seconds = tuple((stage.name, stage.seconds) for stage in message.stages)
    return StageTimes(seconds, message.kv_bytes, message.transport)


def load_to_proto(load: Load) -> pb.Load:
    pairs = [pb.Pair(**asdict(pair)) for pair in load.pairs]
    return pb.Load(**{name: getattr(load, name) for name in _LOAD_FIELDS}, pairs=pairs)


def load_from_proto(message: pb.Load) -> Load:
    pairs = tuple(PairState(*(getattr(p, name) for name in _PAIR_FIELDS)) for p in message.pairs)
    return Load(**{name: getattr(message, name) for name in _LOAD_FIELDS}, pairs=pairs)
