"""Draws where the logits are, by the Triton kernels: the tokens of sampler.py. Nothing here waits for the device: what
a draw needs goes over with the step's other arrays (inputs.py), and what it gives comes back behind it (outputs.py).

R rows, one draw each
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from tercet.core import TokenEvent
from tercet.engine.inputs import FLOAT32, INT32, Arrays
from tercet.engine.outputs import Outputs
from tercet.engine.plan import Draw
from tercet.engine.sampler import NOT_FINITE, logprobs_of, random_words, top_logprobs
from tercet.errors import EngineFault
from tercet.kernels.triton import sampling


class DeviceDraws:
    def __init__(self, arrays: Arrays, draws: Rows[Draw], vocab: int) -> None:
        params = [draw.params for draw in draws]
        self._draws = draws
        self._temperature = arrays.add([0.0 if p.greedy else p.temperature for p in params], FLOAT32)
        self._min_p = arrays.add([p.min_p for p in params], FLOAT32)
        self._top_k = arrays.add([min(p.top_k, vocab) for p in params], INT32)
        self._top_p = arrays.add([p.top_p for p in params], FLOAT32)
        words = [random_words(draw.params.seed or 0, draw.position) for draw in draws]
        self._words = arrays.add(np.array(words, np.int64).reshape(-1, 2))
        self._penalties = _Penalties(arrays, draws, vocab) if any(p.penalises for p in params) else None
        self._wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
        self._wanted_rows = arrays.add(self._wanted)

    def launch(self, logits: Tensor, landed: Rows[Tensor], outputs: Outputs) -> Tensor:
        """logits [R, vocab] float32 -> the tokens, [R] int64, -1 for a row that is not finite."""
        rows = sampling.SamplingRows(
            temperature=landed[self._temperature],
            min_p=landed[self._min_p],
            top_k=landed[self._top_k],
            top_p=landed[self._top_p],
            words=landed[self._words],
        )
        penalties = None if self._penalties is None else self._penalties.of(landed)
        tokens = sampling.sample(logits, rows, penalties)
        self._tokens = outputs.add(tokens)
        if self._wanted:
            at = landed[self._wanted_rows]
            count = max(draw.params.logprobs or 0 for draw in self._draws)
            self._logprobs = list(map(outputs.add, logprobs_of(logits[at], tokens[at].clamp(min=0), count)))
        return tokens

    def events(self, fetched: Rows[Tensor]) -> list[TokenEvent | EngineFault]:
        """fetched: the outputs. One token per row, or why there is none."""
        tokens: list[int] = fetched[self._tokens].tolist()
        events: list[TokenEvent | EngineFault] = [NOT_FINITE if token < 0 else TokenEvent(token) for token in tokens]
        if self._wanted:
            logprobs = top_logprobs(*(fetched[output] for output in self._logprobs))
            for row, (drawn, likeliest) in zip(self._wanted, logprobs, strict=True):
                if tokens[row] >= 0:
                    count = self._draws[row].params.logprobs
                    events[row] = TokenEvent(tokens[row], drawn, likeliest[:count])
        return events


class _Penalties:
    def __init__(self, arrays: Arrays, draws: Rows[Draw], vocab: int) -> None:
        params = [draw.params for draw in draws]
        self._shape = len(draws), vocab
        self._repetition = arrays.add([p.repetition_penalty for p in params], FLOAT32)
        self._presence = arrays.add([p.presence_penalty for p in params], FLOAT32)
        self._frequency = arrays.add([p.frequency_penalty for p in params], FLOAT32)
        self._prompt = arrays.add(_places([draw.prompt for draw in draws], vocab))
        self._output = arrays.add(_places([draw.output for draw in draws], vocab))

    def of(self, landed: Rows[Tensor]) -> sampling.Penalties:
        return sampling.Penalties(
            repetition=landed[self._repetition],
            presence=landed[self._presence],
            frequency=landed[self._frequency],
            in_prompt=self._counts(landed[self._prompt]) > 0,
            in_output=self._counts(landed[self._output]),
        )

    def _counts(self, places: Tensor) -> Tensor:
        """How often each id is in each row: [R, vocab] int32."""
        rows, vocab = self._shape
        counts = torch.zeros(rows * vocab, dtype=torch.int32, device=places.device)
        return counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32)).view(rows, vocab)


def _places(rows: Rows[Rows[int]], vocab: int) -> list[int]:
    """Where the ids of each row are in a flat [R * vocab]."""
    return [row * vocab + token for row, ids in enumerate(rows) for token in ids]
