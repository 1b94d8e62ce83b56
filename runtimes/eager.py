"""The reference runtime: the FX graph itself, operator by operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from recache_compile.ir.program import Program
from recache_compile.runtimes.base import Engine, Runtime


class EagerEngine(Engine):
    """A program's graph on the given weights."""

    def __init__(self, graph: fx.Graph, weights: Mapping[str, Tensor]) -> None:
        self._graph = graph
        self.use(weights)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Operator by operator."""
        with torch.no_grad():
            return [result.contiguous() for result in self._module(*inputs)]

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Read other tensors."""
        self._module = fx.GraphModule(dict(weights), self._graph)


@dataclass(frozen=True, slots=True)
class Eager(Runtime):
    """Runs everywhere and needs nothing."""

    name: str = "eager"
    capturable = True

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """No engine has a file."""
        return ()

    def require(self, building: bool) -> None:
        """Always usable."""

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Nothing to write: the program is the engine."""

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """The program's graph on the given weights."""
        return EagerEngine(program.module.graph, {name: weights[name] for name in program.weights})
