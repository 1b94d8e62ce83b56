"""Artifacts: a folder with a manifest, programs, engines, plans and weights.

manifest.json          facts and the hash of every other file
weights.safetensors    every weight, once, and the known timesteps
programs/V/NAME.json   the programs of variant V
engines/V/NAME.pt2     their engines, for runtimes that have files; NAME.V.onnx beside the weights that they name
policy/                the trained policy and the calibration that other budgets are asked of
"""

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recache_compile._version import __version__
from recache_compile.artifact.asks import store_policy
from recache_compile.artifact.hub import local_folder
from recache_compile.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    ForecasterFacts,
    Manifest,
    StoredPlan,
    StoredVariant,
    is_artifact,
    read_manifest,
    write_manifest,
)
from recache_compile.artifact.restore import program_file, restore, with_config
from recache_compile.artifact.verify import Verify, check_files, hash_of
from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import ArtifactError, RuntimeUnavailableError, check_memory, first_line
from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_to_json, value_to_json
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes._offload import OffloadedEngine
from recache_compile.runtimes.base import (
    Engine,
    Runtime,
    UnavailableEngine,
    is_compatible,
    missing_texts,
    requirement_texts,
)
from recache_compile.runtimes.registry import get_runtime, known_runtime
from recache_compile.support.devices import numbered, parsed_device
from recache_compile.support.files import check_place, output_errors


def save(compiled: Compiled, folder: Path) -> None:
    """Write an artifact beside its place and move it there in one step."""
    check_writable(folder)
    with replacing(folder) as partial:
        _write(compiled, partial)


def check_writable(folder: Path) -> None:
    """Raise `ArtifactError` unless an artifact can be written at `folder`; nothing is left behind."""
    with output_errors(folder, "folder"):
        if folder.exists():
            if not folder.is_dir():
                raise ArtifactError(f"output {folder}: is a file; name a folder")
            if Path.cwd().resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"output {folder}: is the working folder or holds it; name another folder")
            if any(folder.iterdir()) and not is_artifact(folder, alone=True):
                raise ArtifactError(f"output {folder}: holds something that is no artifact; name another folder")
        check_place(folder)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once the block has succeeded.

    A process that is killed leaves the old folder in its place; killed between the two
    renames, it leaves it beside, named `.FOLDER.*.old`.
    """
    folder = folder.resolve()
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        partial.chmod(0o755)
        yield partial
        old = partial.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"output {folder}: cannot be written ({error})") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    offload_prologue: bool = False,
    cuda_graphs: bool | None = None,
    verify: Verify = "once",
    revision: str | None = None,
) -> Compiled:
    """Load an artifact; nothing in it is unpickled, and every file is checked first.

    Args:
        folder: what `Compiled.save` wrote, or the Hub id of one ("NAME/REPOSITORY").
        device: must be of the kind that the engines are for; by default that one.
        offload_prologue: keep the weights that only the prologue reads in the host's memory;
            they are on the device while it runs, once per generation.
        cuda_graphs: replay CUDA graphs instead of calling engines; by default as compiled.
        verify: "once" hashes a file again only where it has changed since it was last found
            whole on this machine; "always" hashes everything.  See `artifact.verify`.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, is from a newer version, or
            its engines do not fit this machine.
    """
    folder = local_folder(folder, revision)

    def engine(number: int, program: Program, weights: Mapping[str, Tensor], away: set[str]) -> Engine:
        files = [folder / file for file in runtime.files(number, program.name)]
        if not (offload_prologue and program.name == "prologue"):
            return runtime.load(program, files, weights, place)
        own = {name: weights[name] for name in program.weights}
        return OffloadedEngine(
            lambda present: runtime.load(program, files, present, place), own, away & set(own), place
        )

    manifest = check(folder, verify=verify)
    with _naming_artifact(folder):
        runtime = get_runtime(manifest.description.config.runtime, building=False)
        place = numbered(torch.device(manifest.device) if device is None else parsed_device(device))
        check_fit(manifest, runtime, place, folder)
        if cuda_graphs:
            check_graphs(runtime, place)
        compiled = restore(folder, manifest, place, engine, "prologue" if offload_prologue else None)
        if cuda_graphs and any(each.has_free_sizes for each in compiled.variants):
            raise ArtifactError("its sizes are free, and CUDA graphs replay calls of one size; load it without them")
        if read_manifest(folder).digest != manifest.digest:
            raise ArtifactError("was replaced while it was read; load it again")
        return compiled if cuda_graphs is None else with_config(compiled, cuda_graphs=cuda_graphs)


def load_own(folder: Path, device: str | None = None) -> Compiled:
    """`load` engines that whoever asks for them compiles again where they are missing.

    Raises:
        ArtifactError: as `load`, with that remedy.
    """
    try:
        return load(folder, device=device)
    except ArtifactError as error:
        reason = str(error).removesuffix("; compile again")
        raise ArtifactError(f"{reason}; remove {folder}, they are then compiled again") from error


def look(folder: str | Path) -> Compiled:
    """An artifact on the CPU without engines, on any machine: for those who only look at it.

    Args:
        folder: as of `load`.

    Raises:
        ArtifactError: the folder is no artifact, or is damaged.
    """
    folder = local_folder(folder)
    manifest = check(folder)
    with _naming_artifact(folder):
        return restore(
            folder, manifest, torch.device("cpu"), lambda *_: UnavailableEngine("the artifact was only looked at")
        )


def check(folder: Path, engines: bool = True, verify: Verify = "once") -> Manifest:
    """The manifest of an artifact whose files are all whole, and no others are there.

    Args:
        folder: of the artifact.
        engines: False: their files may be damaged or missing.
        verify: as of `load`.
    """
    manifest = read_manifest(folder)
    runtime = known_runtime(manifest.description.config.runtime)
    each = [(number, name) for number, facts in enumerate(manifest.variants) for name in facts.programs]
    built = {file for number, name in each for file in runtime.files(number, name)}
    needed = {WEIGHTS, *(program_file(number, name) for number, name in each), *built}
    if unlisted := sorted(needed - set(manifest.files)):
        raise ArtifactError(f"{folder / MANIFEST}: damaged: it does not list {unlisted[0]}; compile again")
    check_files(folder, folder / MANIFEST, manifest.files, set() if engines else built, verify)
    return manifest


def check_fit(manifest: Manifest, runtime: Runtime, device: torch.device, folder: Path) -> None:
    """Raise `ArtifactError` unless the engines run on this device; the message names the command that rebuilds them."""
    command = f"recache-compile rebuild {shlex.quote(str(folder))}"
    built_for = ", ".join([manifest.device, *requirement_texts(manifest.requirements)])
    if device.type == "cuda" and not torch.cuda.is_available():
        if manifest.device == "cpu":
            raise ArtifactError(f"its engines are for {built_for}, and there is no CUDA GPU here; leave the device out")
        raise ArtifactError(
            f"its engines are for {built_for}, and there is no CUDA GPU here; load it where there is one, or run"
            f" {command} --runtime auto --output OTHER"
        )
    if device.type != torch.device(manifest.device).type:
        other = "" if runtime.engine_device(device).type == device.type else " --runtime auto"
        raise ArtifactError(
            f"its engines are for {built_for}, not for {device}; run {command}{other} --device {device}"
        )
    if not is_compatible(manifest.requirements, here := runtime.machine_facts(device)):
        this = ", ".join(missing_texts(manifest.requirements, here))
        raise ArtifactError(f"its engines are for {built_for}, this is {this}; run {command}")


@contextlib.contextmanager
def _naming_artifact(folder: Path) -> Iterator[None]:
    """Errors that say which artifact they are about."""
    try:
        yield
    except RuntimeUnavailableError:
        raise
    except ArtifactError as error:
        raise ArtifactError(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}") from error
    except Exception as error:  # whatever a manifest that makes no sense provokes
        check_memory(error)
        raise ArtifactError(f"{folder}: cannot be loaded ({first_line(error)}); compile again") from error


def _write(compiled: Compiled, folder: Path) -> None:
    engines_built = compiled.engines
    runtime = known_runtime(engines_built.config.runtime)
    engines: list[list[Path]] = []
    for number, variant in enumerate(compiled.variants):
        for name, program in variant.programs.items():
            file = folder / program_file(number, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(program_to_json(program), encoding="utf-8")
            places = runtime.files(number, name)
            for place in places:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(engines_built.folder / place, folder / place)
            engines.append([folder / place for place in places])
    tensors = {f"weights/{name}": weight for name, weight in compiled.weights.items()}
    for number, variant in enumerate(compiled.variants):
        tensors |= {f"timesteps/{number}/{name}": value for name, value in variant.timesteps.items()}
        tensors |= {f"fixed/{number}/{name}": value for name, value in variant.fixed.items()}
    save_file(_without_shared_memory(tensors), folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # the package writes for the owner alone
    for files in engines:
        runtime.link(files, folder / WEIGHTS, "weights/")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        recache_version=__version__,
        requirements=dict(engines_built.requirements),
        device=runtime.engine_device(compiled.variants[0].device).type,
        description=compiled.description,
        signature=engines_built.signature,
        forecaster=ForecasterFacts(
            name=compiled.forecaster.name,
            order=compiled.forecaster.order,
            gram=getattr(compiled.forecaster, "gram", ()),
        ),
        policy=compiled.policy,
        asks=store_policy(compiled.planner, folder),
        plans={
            budget: StoredPlan(recompute_steps=plan.schedule.recompute_steps, steps=plan.steps)
            for budget, plan in compiled.plans.items()
        },
        variants=tuple(
            StoredVariant(
                inputs=tuple(map(value_to_json, variant.inputs)),
                constants=variant.constants,
                programs=tuple(variant.programs),
                macs=variant.macs,
                conditions=variant.conditions,
            )
            for variant in compiled.variants
        ),
        files={str(file.relative_to(folder)): hash_of(file) for file in sorted(folder.rglob("*")) if file.is_file()},
        digest="",
    )
    write_manifest(manifest, folder)


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors asks for."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return stored
