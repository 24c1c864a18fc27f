"""The logprobs of prompt tokens, computed where the model is."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

from torch import Tensor

from tercet.core import PromptScore
from tercet.engine.inputs import Arrays
from tercet.engine.outputs import Outputs
from tercet.engine.plan import Piece
from tercet.engine.sampler import logprobs_of, top_logprobs
from tercet.errors import EngineFault

SCORE_ROWS = 64  # prompt tokens at a time: the logits of a whole prompt would take gigabytes


class PieceScores:
    """Of the tokens that follow those of a piece."""

    def __init__(self, arrays: Arrays, piece: Piece) -> None:
        self._follow = arrays.add(piece.follow)
        self._count, self._most_likely = len(piece.follow), piece.most_likely
        self._outputs: list[list[int]] = []

    def launch(
        self, hidden: Tensor, logits_of: Callable[[Tensor], Tensor | None], landed: Rows[Tensor], outputs: Outputs
    ) -> None:
        """hidden: begins with the piece's rows. logits_of: None where another rank gets the logits."""
        for at in range(0, self._count, SCORE_ROWS):
            rows = slice(at, min(at + SCORE_ROWS, self._count))
            logits = logits_of(hidden[rows])
            if logits is None:
                continue
            finite = logits.amax().isfinite()  # NaN if one is
            found = logprobs_of(logits, landed[self._follow][rows], self._most_likely)
            self._outputs.append([outputs.add(finite), *map(outputs.add, found)])

    def scores(self, fetched: Rows[Tensor]) -> list[PromptScore] | EngineFault:
        scores: list[PromptScore] = []
        for finite, *found in self._outputs:
            if not fetched[finite]:
                return EngineFault("the model's logits for the prompt are not finite numbers")
            scores += top_logprobs(*(fetched[output] for output in found))
        return scores
