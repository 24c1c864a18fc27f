"""Debian's Prometheus scrapes a gateway over real workers: every query of deploy/ is answered, over what it scraped."""

from __future__ import annotations

import aiohttp
import grpc
import pytest

from tercet.roles.gateway.gateway import Gateway
from tercet.spec import GatewaySpec, ListenSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.helpers import TOKEN, cluster, spec_of
from tests.prometheus import promtool, scraping
from tests.queries import expressions, names_in
from tests.tiny import tiny_model

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True, "seed": 1}
# Of what this cluster does not do: it has no mixture, no images, and no worker is lost or switched.
ABSENT = (
    "tercet_expert_",
    "tercet_image_fetches_total",
    "tercet_role_switches_total",
    "tercet_gateway_connections_closed",
)


@pytest.mark.timeout(170)
async def test_prometheus_answers_every_query(tmp_path):
    async with cluster(spec_of("pd", decoders=1, source=tiny_model(), transfer__transport="tcp")) as made:
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        gateway = Gateway(made.spec.model_copy(update={"gateway": anywhere}), TOKEN, made.router)
        info = await gateway.start()
        try:
            await gateway.set_workers(list(made.infos.values()))
            _as_the_controller_tells(gateway, made)
            async with (
                aiohttp.ClientSession(info.http_url) as http,
                grpc.aio.insecure_channel(info.grpc_address) as channel,
                scraping(tmp_path, info.http_url.removeprefix("http://")) as prometheus,
            ):
                await _use(http, channel)  # so that all series are there
                await prometheus.until("tercet_gateway_inflight_requests == 0 and tercet_ready == 1")
                await _use(http, channel)  # so that they have grown
                await prometheus.until('increase(tercet_client_requests_total{outcome="ok"}[30s]) > 0')
                assert promtool("check", "metrics", stdin=await _scraped(http)) == ""
                for where, expression in expressions():
                    await _answered(prometheus, where, expression)
        finally:
            await gateway.stop()


def _as_the_controller_tells(gateway, made):
    """It lives in another process, where Ray is."""
    members = {name: {"role": info.role.value, "state": "live"} for name, info in made.infos.items()}
    gateway.members_told({"prefill": 1, "decode": 1}, members)


async def _use(http, channel):
    """Whole and streamed, cut off and cancelled, wrong, over both ports."""
    for more in ({}, {"stream": True}, {"n": 2}, {"temperature": -1}, {"timeout": 1e-3}):
        async with http.post(COMPLETIONS, json=ASK | more) as answer:
            await answer.read()
    async with http.post(COMPLETIONS, json=ASK | {"max_tokens": 1000, "stream": True}) as answer:
        await answer.content.readline()
        answer.close()
    async with http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]}) as answer:
        await answer.read()
    inference = inference_pb2_grpc.InferenceStub(channel)
    sampling = pb.Sampling(max_tokens=4, ignore_eos=True)
    assert [each async for each in inference.Generate(pb.GenerateRequest(text="hello", sampling=sampling))]
    with pytest.raises(grpc.aio.AioRpcError):
        [_ async for _ in inference.Generate(pb.GenerateRequest(model="none", text="hello"))]


async def _scraped(http):
    async with http.get("/metrics") as answer:
        return await answer.read()


async def _answered(prometheus, where, expression):
    """An alert is quiet here; a panel shows something, once each series has two samples."""
    names = names_in(expression)
    if where.startswith("alert ") or any(name.startswith(ABSENT) for name in names):
        await prometheus.query(expression)
        return
    try:
        await prometheus.until(expression)
    except TimeoutError:
        pytest.fail(f"{where} stays empty: {expression}")
