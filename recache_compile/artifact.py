"""Artifacts: a folder with a manifest, programs, engines, plans and weights.

manifest.json          facts and the hash of every other file
weights.safetensors    every weight, once, and the known timesteps
programs/V/NAME.json   the programs of variant V
engines/V/NAME.pt2     their engines, for runtimes that have files; NAME.V.onnx beside the weights that they name
"""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recache_compile._version import __version__
from recache_compile.capture import Signature
from recache_compile.compiled import Compiled, Description
from recache_compile.errors import ArtifactError, RuntimeUnavailableError
from recache_compile.files import check_place, output_errors
from recache_compile.plan import Plan, StepPlan
from recache_compile.program import Program
from recache_compile.runtimes.base import Variant
from recache_compile.runtimes.registry import get_runtime
from recache_compile.schedule import Schedule
from recache_compile.serialize import program_from_json, program_to_json, read_value, value_to_json

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Plan(_Facts):
    recompute_steps: tuple[int, ...]
    steps: tuple[StepPlan, ...]


class _Variant(_Facts):
    inputs: tuple[dict[str, Any], ...]
    constants: tuple[tuple[str, str], ...]
    programs: tuple[str, ...]
    macs: int


class _Manifest(_Facts):
    format_version: Literal[3]
    recache_version: str
    engines_for: str | None
    device: str
    description: Description
    signature: Signature
    plans: dict[int, _Plan]
    variants: tuple[_Variant, ...]
    files: dict[str, str]
    digest: str


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
            if any(folder.iterdir()) and not _is_artifact(folder):
                raise ArtifactError(f"output {folder}: holds something that is no artifact; name another folder")
        check_place(folder)


def _is_artifact(folder: Path) -> bool:
    """Whether a folder holds an artifact's files, whole or not, and nothing else."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *facts["files"]} if "recache_version" in facts else set()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return _files(folder) <= listed


def _files(folder: Path) -> set[str]:
    """Names of all that is not a folder, relative to `folder`."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}


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


def load(folder: str | Path, device: str | torch.device | None = None) -> Compiled:
    """Load an artifact; nothing in it is unpickled, and every file is checked first.

    Args:
        folder: what `Compiled.save` wrote.
        device: must be the device type it was compiled for; by default that one.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, is from a newer version, or
            its engines do not fit this machine.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    try:
        return _restore(folder, manifest, torch.device(manifest.device if device is None else device))
    except RuntimeUnavailableError:
        raise
    except ArtifactError as error:
        raise ArtifactError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    except Exception as error:  # whatever a manifest that makes no sense provokes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(f"{folder}: cannot be loaded ({reason[0]}); compile again") from error


def _restore(folder: Path, manifest: _Manifest, device: torch.device) -> Compiled:
    """Everything that `load` returns, from files that are known to be whole."""
    description = manifest.description
    if device != torch.device(manifest.device):
        raise ArtifactError(f"compiled for {manifest.device}, not for {device}; compile again there")
    runtime = get_runtime(description.runtime)
    if (found := runtime.key(device)) != manifest.engines_for:
        raise ArtifactError(f"its engines are for {manifest.engines_for}, this is {found}; compile again here")
    tensors = load_file(folder / WEIGHTS, device=str(device))
    weights = _under("weights/", tensors)
    variants = []
    for number, facts in enumerate(manifest.variants):
        programs = {name: _read_program(folder, number, name, weights) for name in facts.programs}
        engines = {
            name: runtime.load(program, [folder / file for file in runtime.files(number, name)], weights, device)
            for name, program in programs.items()
        }
        inputs = tuple(read_value(entry) for entry in facts.inputs)
        variants.append(
            Variant(
                inputs=inputs,
                constants=facts.constants,
                fixed=_under(f"fixed/{number}/", tensors),
                device=device,
                programs=programs,
                engines=engines,
                timesteps=_under(f"timesteps/{number}/", tensors),
                macs=facts.macs,
            )
        )
    plans = {
        budget: Plan(Schedule(plan.recompute_steps, description.num_steps), plan.steps)
        for budget, plan in manifest.plans.items()
    }
    check_plans(plans, variants)
    return Compiled(description, manifest.signature, plans, tuple(variants), weights, folder)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, which is removed."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_plans(plans: Mapping[int, Plan], variants: Sequence[Variant]) -> None:
    """Raise unless every plan keeps its budget and finds its programs and its history."""
    if not variants or not plans:
        raise ArtifactError("the manifest names no variant or no plan; compile again")
    for budget, plan in plans.items():
        written: set[int] = set()
        if plan.schedule.budget != budget or len(plan.steps) != plan.schedule.num_steps:
            raise ArtifactError(f"the plan of budget {budget} is not one; compile again")
        for number, step in enumerate(plan.steps):
            written |= set() if step.slot is None else {step.slot}
            sound = (
                (step.slot is not None) == (number in plan.schedule.recompute_steps)
                and len(step.coefficients) == max(step.row)
                and all(map(math.isfinite, step.coefficients))
                and written >= set(range(max(step.row)))
                and all(step.program in variant.programs for variant in variants)
            )
            if not sound:
                raise ArtifactError(f"the plan of budget {budget} makes no sense at step {number}; compile again")


def _write(compiled: Compiled, folder: Path) -> None:
    runtime = get_runtime(compiled.description.runtime)
    engines: list[list[Path]] = []
    for number, variant in enumerate(compiled.variants):
        for name, program in variant.programs.items():
            file = folder / _program_file(number, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(program_to_json(program), encoding="utf-8")
            places = runtime.files(number, name)
            for place in places:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(compiled.folder / place, folder / place)
            engines.append([folder / place for place in places])
    tensors = {f"weights/{name}": weight for name, weight in compiled.weights.items()}
    for number, variant in enumerate(compiled.variants):
        tensors |= {f"timesteps/{number}/{name}": value for name, value in variant.timesteps.items()}
        tensors |= {f"fixed/{number}/{name}": value for name, value in variant.fixed.items()}
    save_file(_apart(tensors), folder / WEIGHTS)
    for files in engines:
        runtime.link(files, folder / WEIGHTS, "weights/")
    device = compiled.variants[0].device
    manifest = _Manifest(
        format_version=FORMAT_VERSION,
        recache_version=__version__,
        engines_for=runtime.key(device),
        device=str(device),
        description=compiled.description,
        signature=compiled.signature,
        plans={
            budget: _Plan(recompute_steps=plan.schedule.recompute_steps, steps=plan.steps)
            for budget, plan in compiled.plans.items()
        },
        variants=tuple(
            _Variant(
                inputs=tuple(map(value_to_json, variant.inputs)),
                constants=variant.constants,
                programs=tuple(variant.programs),
                macs=variant.macs,
            )
            for variant in compiled.variants
        ),
        files={str(file.relative_to(folder)): _hash(file) for file in sorted(folder.rglob("*")) if file.is_file()},
        digest="",
    )
    facts = json.loads(manifest.model_dump_json())
    facts["digest"] = _digest(facts)
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors asks for."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return stored


def _digest(facts: Mapping[str, Any]) -> str:
    """Hash of a manifest's facts, its own digest left out."""
    canonical = json.dumps({name: fact for name, fact in facts.items() if name != "digest"}, sort_keys=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _read_manifest(folder: Path) -> _Manifest:
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no artifact (there is no {MANIFEST}); make one with recache-compile") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error})") from None
    try:
        version = _Version.model_validate_json(text).format_version
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"{folder}: format {version}, this version reads up to {FORMAT_VERSION}; upgrade recache-compile"
            )
        if version < FORMAT_VERSION:
            raise ArtifactError(f"{folder}: format {version}, of an older version of recache-compile; compile again")
        manifest = _Manifest.model_validate_json(text)
        if manifest.digest != _digest(json.loads(text)):
            raise ArtifactError(f"{file}: damaged (its digest differs); compile again")
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: damaged at {where}: {first['msg']}; compile again") from None


class _Version(BaseModel):
    format_version: int


def _check_files(folder: Path, manifest: _Manifest) -> None:
    """Every file of the manifest is there and unchanged, and there is no other."""
    present = _files(folder) - {MANIFEST}
    runtime = get_runtime(manifest.description.runtime)
    needed = [
        file
        for number, facts in enumerate(manifest.variants)
        for name in facts.programs
        for file in (_program_file(number, name), *runtime.files(number, name))
    ]
    if unlisted := sorted({WEIGHTS, *needed} - set(manifest.files)):
        raise ArtifactError(f"{folder / MANIFEST}: damaged: it does not list {unlisted[0]}; compile again")
    for name, expected in manifest.files.items():
        file = folder / name
        if name not in present:
            raise ArtifactError(f"{file}: missing from the artifact; compile again")
        if _hash(file) != expected:
            raise ArtifactError(f"{file}: damaged (its hash differs from the manifest's); compile again")
    if extra := sorted(present - set(manifest.files)):
        raise ArtifactError(f"{folder / extra[0]}: not part of the artifact; remove it or compile again")


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _read_program(folder: Path, number: int, name: str, weights: dict[str, torch.Tensor]) -> Program:
    file = folder / _program_file(number, name)
    try:
        return program_from_json(file.read_text(encoding="utf-8"), weights)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from error


def _program_file(number: int, name: str) -> str:
    return f"programs/{number}/{name}.json"
