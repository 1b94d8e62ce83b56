"""New engines for an artifact, from the programs inside: for this machine, another GPU or another runtime."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.artifact.manifest import Manifest
from recache_compile.artifact.store import check, restore
from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import RuntimeUnavailableError
from recache_compile.ir.program import Program
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes.base import Engine, Runtime, lower
from recache_compile.runtimes.registry import get_runtime
from recache_compile.support.devices import usable_device


def rebuild(
    folder: str | Path,
    runtime: str | Runtime | None = None,
    device: str | torch.device | None = None,
    report: Callable[[str], None] = lambda stage: None,
) -> Compiled:
    """Build an artifact's engines again; neither the model nor its checkpoint is needed.

    Args:
        folder: of the artifact; it stays as it is until the result is saved.
        runtime: for the new engines; by default the artifact's, with its targets where there is no
            GPU here, and else the options' defaults.
        device: to build for; by default the artifact's where it is here, else the CPU.
        report: told the name of each stage as it begins.

    Raises:
        ArtifactError: the folder is no artifact, or something of it but its engines is damaged.
        RuntimeUnavailableError: the runtime cannot build here.
    """
    folder = Path(folder)
    manifest = check(folder, engines=False)
    backend = get_runtime(_same_runtime(manifest) if runtime is None else runtime)
    wanted = manifest.device if device is None and torch.cuda.is_available() else device
    place = usable_device(wanted)
    keep = tempfile.TemporaryDirectory(prefix="recache-")

    def engine(number: int, program: Program, weights: Mapping[str, Tensor], away: set[str]) -> Engine:
        report(f"lowering {program.name} to {backend.name}")
        return lower(program, backend, weights, place, Path(keep.name), number)

    compiled = restore(folder, manifest, place, engine)
    graphs = compiled.description.cuda_graphs
    if graphs:
        try:
            check_graphs(backend, place)
        except RuntimeUnavailableError as error:
            report(f"without CUDA graphs: {error}")
            graphs = False
    description = replace(compiled.description, runtime=backend.name, cuda_graphs=graphs)
    return replace(
        compiled,
        description=description,
        folder=Path(keep.name),
        engines_for=backend.build_requirements(place),
        keep=keep,
    )


def _same_runtime(manifest: Manifest) -> str | Runtime:
    """The artifact's runtime; engines that cannot be for this machine stay for the GPUs that they were for."""
    from recache_compile.runtimes.tensorrt import TensorRTForRTX

    name = manifest.description.runtime
    if name != TensorRTForRTX().name or torch.cuda.is_available():
        return name
    return TensorRTForRTX(targets=tuple(manifest.engines_for["gpu"].split(" or ")))
