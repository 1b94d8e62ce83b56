"""New engines for an artifact, from the programs inside: for this machine, another GPU or another runtime."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.artifact.manifest import Manifest
from recache_compile.artifact.restore import restore, with_config
from recache_compile.artifact.store import check
from recache_compile.compiler.compiled import Compiled
from recache_compile.compiler.lowering import lower
from recache_compile.compiler.side_by_side import Helpers, Job
from recache_compile.errors import RuntimeUnavailableError
from recache_compile.ir.program import Program
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes.base import Engine, Runtime, bounds_of
from recache_compile.runtimes.registry import get_runtime
from recache_compile.support.devices import usable_device

log = logging.getLogger(__name__)


def rebuild(
    folder: str | Path,
    runtime: str | Runtime | None = None,
    device: str | torch.device | None = None,
) -> Compiled:
    """Build an artifact's engines again; neither the model nor its checkpoint is needed.

    Args:
        folder: of the artifact; it stays as it is until the result is saved.
        runtime: for the new engines; by default the artifact's, with its targets where there is no
            GPU here, and else the options' defaults.
        device: to build for; by default the artifact's where it is here, else the CPU.

    Raises:
        ArtifactError: the folder is no artifact, or something of it but its engines is damaged.
        RuntimeUnavailableError: the runtime cannot build here.
    """
    folder = Path(folder)
    manifest = check(folder, engines=False)
    backend = get_runtime(_same_runtime(manifest) if runtime is None else runtime)
    wanted = manifest.device if device is None and torch.cuda.is_available() else device
    place = usable_device(wanted)
    helpers = Helpers(backend, place)  # none are started: an artifact's programs come one after another
    keep = tempfile.TemporaryDirectory(prefix="recache-")

    def engine(number: int, program: Program, weights: Mapping[str, Tensor], away: set[str]) -> Engine:
        files = [Path(keep.name) / file for file in backend.files(number, program.name)]
        lower([Job(program, files)], backend, place, helpers)
        return backend.load(program, files, weights, place)

    compiled = restore(folder, manifest, place, engine)
    graphs = compiled.engines.config.cuda_graphs
    if graphs:
        try:
            check_graphs(backend, place)
        except RuntimeUnavailableError as error:
            log.info("without CUDA graphs: %s", error)
            graphs = False
    compiled = with_config(compiled, runtime=backend.name, cuda_graphs=graphs, device=str(place))
    requirements = backend.build_requirements(place)
    variants = tuple(replace(each, bounds=bounds_of(each.programs["recompute"], backend)) for each in compiled.variants)
    engines = replace(compiled.engines, variants=variants, folder=Path(keep.name), requirements=requirements, keep=keep)
    return replace(compiled, engines=engines)


def _same_runtime(manifest: Manifest) -> str | Runtime:
    """The artifact's runtime; engines that cannot be for this machine stay for the GPUs that they were for."""
    from recache_compile.runtimes.tensorrt import TensorRTForRTX

    name = manifest.description.config.runtime
    if name != TensorRTForRTX().name or torch.cuda.is_available():
        return name
    return TensorRTForRTX(targets=tuple(manifest.requirements["gpu"].split(" or ")))
