"""Compiled models between processes: by their folder where they have one, else with all of their files.

What is pickled holds an artifact, which is checked like any other; no code of it is unpickled.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from recache_compile.artifact.asks import can_store
from recache_compile.artifact.manifest import MANIFEST, read_manifest
from recache_compile.artifact.store import load
from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import ArtifactError

Reduced = tuple[Any, tuple[Any, ...]]


def reduce(compiled: Compiled) -> Reduced:
    """What `pickle` keeps of a compiled model.

    Engines that were loaded from a folder, and have its weights still, are found there again; the
    files of others travel along.
    """
    engines, shared = compiled.engines, compiled.shared
    bounds = None if shared is None else (shared.max_batch, shared.max_wait_ms)
    folder, device = engines.folder, str(engines.device)
    if engines.revision.number == 0 and (folder / MANIFEST).is_file():
        how = {
            "device": device,
            "cuda_graphs": engines.config.cuda_graphs,
            "offload_prologue": any(weight.device != engines.device for weight in engines.weights.values()),
        }
        asked = compiled.planner
        policy = asked.policy if can_store(asked.policy) else None
        plans = compiled.schedules, compiled.forecaster, compiled.policy, policy, asked.calibration
        return _from_folder, (str(folder), read_manifest(folder).digest, how, plans, bounds)
    with tempfile.TemporaryDirectory(prefix="recache-") as place:
        made = Path(place, "artifact")
        compiled.save(made)
        files = {str(file.relative_to(made)): file.read_bytes() for file in sorted(made.rglob("*")) if file.is_file()}
    return _from_files, (files, device, bounds)


def _from_folder(
    folder: str, digest: str, how: dict[str, Any], plans: tuple[Any, ...], bounds: tuple[Any, ...] | None
) -> Compiled:
    if read_manifest(Path(folder)).digest != digest:
        raise ArtifactError(f"{folder}: is another artifact than the one that was pickled; load it instead")
    return _shared(load(folder, **how).engines.with_plans(*plans), bounds)


def _from_files(files: dict[str, bytes], device: str, bounds: tuple[Any, ...] | None) -> Compiled:
    place = tempfile.TemporaryDirectory(prefix="recache-")
    for name, content in files.items():
        file = Path(place.name, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    compiled = load(place.name, device=device, verify="always")
    return _shared(replace(compiled, engines=replace(compiled.engines, keep=place)), bounds)


def _shared(compiled: Compiled, bounds: tuple[Any, ...] | None) -> Compiled:
    """The same, with dispatchers that share their recompute calls where those that were pickled did."""
    return compiled if bounds is None else compiled.batcher(*bounds)
