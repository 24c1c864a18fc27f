"""`tercet.v1.Inference`, over the same frontend as HTTP.

The call's deadline and its cancellation are the request's. A failure is a gRPC status with details `code: message`
(wire/grpc_server.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import grpc

from tercet.core import SamplingParams
from tercet.errors import InvalidRequest, TercetError, as_named
from tercet.metrics import CHAT, TEXT_COMPLETION
from tercet.roles.gateway.ask import Ask, Chat, Delta, Prompt
from tercet.roles.gateway.bounds import bound
from tercet.roles.gateway.frontend import Frontend
from tercet.roles.gateway.observing import Observed, Observer
from tercet.roles.gateway.openai_messages import messages_of
from tercet.roles.gateway.openai_reply import LOWEST_LOGPROB
from tercet.roles.gateway.session import Session
from tercet.wire.codec import sampling_from_proto
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tercet.wire.grpc_call import Call

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

METHOD = f"{SERVICE}/Generate"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Written with context.write, not as a generator, so that a cancellation is always raised in our code."""

    def __init__(self, frontend: Frontend, observer: Observer) -> None:
        self._frontend = frontend
        self._observer = observer

    async def Generate(self, request: pb.GenerateRequest, context: Call) -> None:  # noqa: N802, the proto's name
        operation = CHAT if request.WhichOneof("prompt") == "chat" else TEXT_COMPLETION
        headers = {name: context.header(name.encode()).decode("latin-1") for name in ("traceparent", "tracestate")}
        request_id = request.request_id if _REQUEST_ID.fullmatch(request.request_id) else f"grpc-{context.id}"
        caller = context.caller
        with (
            self._observer.open(METHOD, request_id, caller.client, operation, headers) as observed,
            self._frontend.metrics.request(operation, caller.label),
        ):
            try:
                await self._generate(request, context, observed)
            except TercetError:
                raise
            except Exception as error:  # a boundary: it is logged under the request's id, which the client is told
                raise as_named(error, observed.request_id) from error
            observed.status = grpc.StatusCode.OK.name

    async def _generate(self, request: pb.GenerateRequest, context: Call, observed: Observed) -> None:
        ask = self._ask(request, context, observed)
        self._frontend.check_model(request.model)
        async with self._frontend.session(ask) as session, aclosing(session.deltas()) as deltas:
            observed.begun(session)
            context.release()
            async for delta in deltas:
                await context.write(_delta(ask.request_id, delta))
                self._frontend.metrics.gateway_token.observe(time.monotonic() - delta.received)
            await context.write(_done(session, delta))

    def _ask(self, request: pb.GenerateRequest, context: Call, observed: Observed) -> Ask:
        """Raises InvalidRequest. A deadline beyond the limit is reduced to it, not refused."""
        arrived = time.monotonic()
        if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
            raise InvalidRequest(f"request_id must match {_REQUEST_ID.pattern}")
        limit_s, remaining_s = self._frontend.limits.request_timeout_s, context.time_remaining()
        bound("stop", request.sampling.stop)
        return Ask(
            request_id=observed.request_id,
            prompts=(_prompt(request),),
            params=_params(request.sampling),
            timeout_s=limit_s if remaining_s is None else min(remaining_s, limit_s),
            arrived=arrived,
            client=context.caller.client,
            key=context.caller.key,
            trace=observed.trace,
            max_tokens_given=request.sampling.HasField("max_tokens"),
            stop=tuple(request.sampling.stop),
        )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "tokens":
            bound("prompt[]", request.tokens.ids, "prompt")
            return tuple(request.tokens.ids)
        case "chat" if request.chat.messages:
            bound("messages", request.chat.messages)
            messages, images = messages_of([_message(message) for message in request.chat.messages])
            return Chat(messages, images=images)
    raise InvalidRequest("prompt must not be empty")


def _params(sampling: pb.Sampling) -> SamplingParams:
    bound("stop_token_ids", sampling.stop_token_ids)
    return sampling_from_proto(sampling)


def _delta(request_id: str, delta: Delta) -> pb.GenerateResponse:
    ids = [token.token_id for token in delta.tokens]
    return pb.GenerateResponse(
        request_id=request_id,
        delta=pb.GenerateResponse.Delta(token_ids=ids, text=delta.text, logprobs=_logprobs(delta)),
    )


def _message(message: pb.Message) -> dict[str, Any]:
    """As HTTP has it."""
    if not message.images and not message.image_parts:
        return {"role": message.role, "content": message.content}
    bound("messages[].content", [*message.images, *message.image_parts], "images")
    parts: list[Any] = [{"type": "image_url", "image_url": file} for file in message.images]
    parts += map(_image, message.image_parts)
    return {"role": message.role, "content": [*parts, *([message.content] if message.content else [])]}


def _image(image: pb.ImagePart) -> dict[str, Any]:
    source = image.WhichOneof("source")
    return {"type": "image_url", "image_url": getattr(image, source) if source else None, "uuid": image.uuid or None}


def _logprobs(delta: Delta) -> Sequence[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(token_id=token.token_id, logprob=max(token.logprob, LOWEST_LOGPROB))
        for token in delta.tokens
        if token.logprob is not None
    ]


def _done(session: Session, last: Delta) -> pb.GenerateResponse:
    usage, t = session.usage, session.timings
    timings = pb.Timings(
        **{f"{stage}_s": seconds for stage, seconds in t.stages.items()},
        kv_bytes=t.kv_bytes,
        transport=t.transport,
        ttft_s=t.ttft_s,
        gateway_s=t.gateway_s,
        tpot_s=t.tpot_s,
    )
    done = pb.GenerateResponse.Done(
        finish_reason=last.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        timings=timings,
        workers=t.workers,
    )
    return pb.GenerateResponse(request_id=session.ask.request_id, done=done)
