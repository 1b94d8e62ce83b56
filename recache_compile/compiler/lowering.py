"""Programs become engines: files in one folder, weights shared by all of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.compiler.program_cache import engine_key, keep_engine, read_engine
from recache_compile.compiler.side_by_side import Helpers, Job
from recache_compile.ir.program import Program
from recache_compile.runtimes.base import Engine, Runtime

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lowering:
    """Lowers the programs of one variant after another.

    Args:
        runtime: the backend.
        folder: of the engines' files, laid out as in an artifact.
        helpers: lower programs side by side.
        weights: all that were met, by name.
        variants: how many were lowered.
    """

    runtime: Runtime
    folder: Path
    helpers: Helpers
    weights: dict[str, Tensor] = field(default_factory=dict)
    variants: int = 0

    def lower(self, programs: Mapping[str, Program], device: torch.device) -> dict[str, Engine]:
        """The engines of the next variant's programs, by name; they share the weights of those before."""
        for program in programs.values():
            self.weights = {**program.weights, **self.weights}
        jobs = [Job(program, self._files(program)) for program in programs.values()]
        lower(jobs, self.runtime, device, self.helpers)
        self.variants += 1
        return {job.program.name: self.runtime.load(job.program, job.files, self.weights, device) for job in jobs}

    def _files(self, program: Program) -> list[Path]:
        return [self.folder / file for file in self.runtime.files(self.variants, program.name)]


def lower(jobs: Sequence[Job], runtime: Runtime, device: torch.device, helpers: Helpers) -> None:
    """Write the engines of programs, or copy those that were made before."""
    missing: dict[Job, str | None] = {}
    facts = runtime.lowering_facts(device)
    for job in jobs:
        for file in job.files:
            file.parent.mkdir(parents=True, exist_ok=True)
        key = engine_key(job.program, runtime, device, facts)
        if not read_engine(key, job.files):
            missing[job] = key
    if found := [job.program.name for job in jobs if job not in missing]:
        log.info("from the cache: %s", ", ".join(found))
    if missing:
        log.info("lowering %s to %s", ", ".join(job.program.name for job in missing), runtime.name)
    helpers.lower([*missing], facts, lambda job: runtime.lower(job.program, device, job.files))
    for job, key in missing.items():
        keep_engine(key, job.files)
