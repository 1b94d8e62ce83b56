"""Programs become engines: files in one folder, weights shared by all of them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.ir.program import Program
from recache_compile.runtimes.base import Engine, Runtime, lower

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lowering:
    """Lowers the programs of one variant after another.

    Args:
        runtime: the backend.
        folder: of the engines' files, laid out as in an artifact.
        weights: all that were met, by name.
        variants: how many were lowered.
    """

    runtime: Runtime
    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)
    variants: int = 0

    def lower(self, programs: Mapping[str, Program], device: torch.device) -> dict[str, Engine]:
        """The engines of the next variant's programs, by name; they share the weights of those before."""
        for program in programs.values():
            self.weights = {**program.weights, **self.weights}
        engines = {name: self._engine(program, device) for name, program in programs.items()}
        self.variants += 1
        return engines

    def _engine(self, program: Program, device: torch.device) -> Engine:
        log.info("lowering %s to %s", program.name, self.runtime.name)
        return lower(program, self.runtime, self.weights, device, self.folder, self.variants)
