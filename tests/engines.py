"""A prefill engine and a decode engine in this process, with nothing between them: a handoff copies each pushed block
straight into the other cache. What the mover and the roles do is left out; what the engines do is all real."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Rows

from tercet.core import SamplingParams, Ticket
from tercet.engine.executor import Executor, LocalExecutor
from tercet.engine.loop import Engine
from tercet.engine.report import Faulted, StepReport
from tercet.engine.runner import PushBlocks, Runner
from tercet.engine.sequence import Sequence
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.packing import LinearPacker
from tercet.models.loader import LoadedModel
from tercet.models.sources import load_model
from tercet.spec import KvSpec, ModelSpec, RoleSpec, SchedulerSpec
from tercet.transfer.memory.region import Region
from tests.tiny import CONTEXT, tiny_model

SIZE = 16
GREEDY = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def load_tiny(kernels: Kernels | None = None) -> LoadedModel:
    """By default with torch's kernels; those with plain products: oneDNN would make a new kernel for each new number of
    rows, which takes longer than these products do."""
    kernels = kernels or Kernels()
    if kernels.native:
        return load_model(ModelSpec(source=tiny_model(), dtype="float32", max_context=CONTEXT), kernels)
    pack = LinearPacker.pack
    LinearPacker.pack = lambda self, weight, bias=None: PackedLinear(weight, bias)  # type: ignore[method-assign]
    try:
        return load_model(ModelSpec(source=tiny_model(), dtype="float32", max_context=CONTEXT), kernels)
    finally:
        LinearPacker.pack = pack  # type: ignore[method-assign]


class Running:
    """An engine on its thread; `done` gets (sequence, its tokens or the fault) when one is over."""

    def __init__(
        self,
        loaded: LoadedModel,
        budget: int = 512,
        blocks: int = 640,
        max_running: int = 16,
        prefix: bool = False,
        push: PushBlocks | None = None,
        executor: Callable[[Runner], Executor] = LocalExecutor,
    ) -> None:
        self.region = Region(loaded.model.kv_layout(blocks, SIZE))
        self.runner = Runner(loaded.model, self.region, push)
        spec = RoleSpec(
            scheduler=SchedulerSpec(token_budget=budget, max_running=max_running, max_waiting=512),
            kv=KvSpec(blocks=blocks, block_size=SIZE, prefix_cache=prefix),
        )
        self.executor = executor(self.runner)
        self.engine = Engine(self.executor, spec, CONTEXT, (), 128, self._report)
        self.outputs: dict[Sequence, list[int]] = {}
        self.done: queue.Queue[tuple[Sequence, list[int] | Exception]] = queue.Queue()
        self._thread = threading.Thread(target=self.engine.run, daemon=True)
        self._thread.start()

    def add(
        self, number: int, token_ids: Rows[int], params: SamplingParams = GREEDY, num_prompt: int | None = None
    ) -> Sequence:
        """num_prompt: how many of the ids are the prompt, if some were sampled already."""
        prompt = len(token_ids) if num_prompt is None else num_prompt
        sequence = Sequence(Ticket(f"r{number}", 0, 1), list(token_ids), prompt, params)
        self.engine.add(sequence)
        return sequence

    def _report(self, report: StepReport) -> None:
        for item in report:
            if isinstance(item, Faulted):
                self.done.put((item.sequence, item.error))
                continue
            tokens = self.outputs.setdefault(item.sequence, [])
            tokens.append(item.token.token_id)
            if item.token.finish is not None or item.sequence.hand_over:
                self.done.put((item.sequence, tokens))

    def stop(self) -> None:
        """The leak oracle, then the end."""
        self.engine.check_integrity()
        load = self.engine.load()
        assert load.blocks_free == load.blocks_total, load
        self.engine.stop()
        self._thread.join()
        assert self.engine.failure is None


class Handover:
    """`run` computes prompts at `prefill` and decodes them at `decode`."""

    def __init__(self, loaded: LoadedModel, budget: int = 512) -> None:
        self.prefill, self.decode = Running(loaded, budget, push=self._push), Running(loaded)
        self._targets: dict[Ticket, tuple[Sequence, list[int]]] = {}

    def _push(self, ticket: Ticket, layer: int, first: int, blocks: Rows[int]) -> None:
        """On the prefill engine's thread."""
        target, pushed = self._targets[ticket]
        source, destination = self.prefill.runner.kv_cache[layer], self.decode.runner.kv_cache[layer]
        for index, block in enumerate(blocks, first):
            destination[target.blocks[index]] = source[block]
            pushed.append(index)

    def run(self, prompts: Rows[Rows[int]], at_once: int, params: SamplingParams = GREEDY) -> list[list[int]]:
        """-> the tokens of each prompt. Every block must have been pushed, each layer once."""
        waiting, running, outputs = list(enumerate(prompts)), 0, {}
        while waiting or running:
            while waiting and running < at_once:
                self._begin(*waiting.pop(0), params)
                running += 1
            source, first = self.prefill.done.get(timeout=30)
            assert isinstance(first, list), first
            target, pushed = self._targets.pop(source.ticket)
            layers = self.prefill.region.layout.layers
            assert sorted(pushed) == sorted([*range(len(target.blocks))] * layers), source.ticket
            self.prefill.engine.op_done(source)
            self.decode.engine.join(target, first[0])
            over, rest = self.decode.done.get(timeout=30)
            assert isinstance(rest, list), rest
            outputs[int(over.ticket.request_id[1:])] = [over.token_ids[over.num_prompt], *rest]
            running -= 1
        return [outputs[number] for number in range(len(prompts))]

    def _begin(self, number: int, prompt: Rows[int], params: SamplingParams) -> None:
        ticket = Ticket(f"r{number}", 0, 1)
        target = Sequence(ticket, list(prompt), len(prompt), params)
        self.decode.engine.reserve(target)
        self._targets[ticket] = (target, [])
        self.prefill.engine.add(Sequence(ticket, list(prompt), len(prompt), params, hand_over=True))

    def stop(self) -> None:
        self.prefill.stop()
        self.decode.stop()
