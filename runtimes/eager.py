"""The reference runtime: the FX graph itself, operator by operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from recache_compile.program import Program
from recache_compile.runtimes.base import Engine


@dataclass(frozen=True, slots=True)
class Eager:
    """Runs everywhere and needs nothing."""

    name: str = "eager"

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """No engine has a file."""
        return ()

    def key(self, device: torch.device) -> str | None:
        """Runs everywhere."""
        return None

    def require(self) -> None:
        """Always usable."""

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Nothing to write: the program is the engine."""

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """There is no file."""

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """The program's graph on the given weights."""
        module = fx.GraphModule({name: weights[name] for name in program.weights}, program.module.graph)

        def engine(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                return module(*inputs)  # type: ignore[no-any-return]

        return engine
