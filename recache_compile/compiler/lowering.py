"""Programs become engines: files in one folder, weights shared by all of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.compiler.program_cache import engine_key, keep_engine, read_engine
from recache_compile.ir.program import Program
from recache_compile.runtimes.base import Engine, Runtime

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
        places = {name: self._files(program) for name, program in programs.items()}
        for name, program in programs.items():
            lower(program, self.runtime, device, places[name])
        self.variants += 1
        return {
            name: self.runtime.load(program, places[name], self.weights, device) for name, program in programs.items()
        }

    def _files(self, program: Program) -> list[Path]:
        return [self.folder / file for file in self.runtime.files(self.variants, program.name)]


def lower(program: Program, runtime: Runtime, device: torch.device, files: Sequence[Path]) -> None:
    """Write a program's engine, or copy one that was made before."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    key = engine_key(program, runtime, device)
    if read_engine(key, files):
        log.info("%s from the cache", program.name)
        return
    log.info("lowering %s to %s", program.name, runtime.name)
    runtime.lower(program, device, files)
    keep_engine(key, files)
