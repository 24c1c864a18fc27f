"""What a rank's model knows of its group: where it stands, and how it talks to the ranks that it computes with."""

from __future__ import annotations

from dataclasses import dataclass, field

from tercet.distributed.collectives import Alone, Collectives, Traffic
from tercet.distributed.place import Place
from tercet.distributed.spread import Spread
from tercet.distributed.stages import Stages


@dataclass(frozen=True)
class Ranks:
    place: Place = field(default_factory=Place)
    tensor: Collectives = field(default_factory=Alone)  # of the ranks that share each layer's heads and columns
    stages: Stages | None = None  # of a pipeline
    spread: Spread | None = None  # of experts

    def stop(self) -> None:
        """Nobody waits for another rank any more. Any thread."""
        self.tensor.stop()
        if self.stages is not None:
            self.stages.stop()
        if self.spread is not None:
            self.spread.cut_all()

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Of each kind of parallelism that this rank takes part in."""
        sums = self.tensor if self.tensor.size > 1 else None
        parts = {"tensor": sums, "pipeline": self.stages, "expert": self.spread}
        return {kind: part.traffic for kind, part in parts.items() if part is not None}

    def close(self) -> None:
        """Once no step runs: what leads to the other ranks ends, and with the exchange those of the other ranks."""
        self.tensor.close()
        if self.stages is not None:
            self.stages.close()
        if self.spread is not None:
            self.spread.exchange.close()
