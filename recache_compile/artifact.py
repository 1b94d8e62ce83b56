"""Artifacts: a folder with a manifest, programs, engines, plans and weights.

manifest.json          facts and the hash of every other file
weights.safetensors    every weight, once, and the known timesteps
programs/V/NAME.json   the programs of variant V
engines/V/NAME.pt2     their engines, for runtimes that have files
"""

import contextlib
import hashlib
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recache_compile._version import __version__
from recache_compile.capture import Signature
from recache_compile.compiled import Compiled, Description
from recache_compile.errors import ArtifactError
from recache_compile.plan import Plan, StepPlan
from recache_compile.program import Program
from recache_compile.runtimes.base import Variant
from recache_compile.runtimes.registry import get_runtime
from recache_compile.schedule import Schedule
from recache_compile.serialize import program_from_json, program_to_json, read_value, value_to_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Plan(_Facts):
    recompute_steps: tuple[int, ...]
    steps: tuple[StepPlan, ...]


class _Variant(_Facts):
    inputs: tuple[dict[str, Any], ...]
    programs: tuple[str, ...]
    capture_macs: int


class _Manifest(_Facts):
    format_version: Literal[1]
    recache_version: str
    torch_version: str
    platform: str
    device: str
    description: Description
    signature: Signature
    plans: dict[int, _Plan]
    variants: tuple[_Variant, ...]
    files: dict[str, str]


def save(compiled: Compiled, folder: Path) -> None:
    """Write an artifact beside its place and move it there in one step."""
    check_writable(folder)
    with replacing(folder) as partial:
        _write(compiled, partial)


def check_writable(folder: Path) -> None:
    """Raise `ArtifactError` unless an artifact can be written at `folder`."""
    if folder.exists():
        if not folder.is_dir():
            raise ArtifactError(f"output {folder}: is a file; name a folder")
        if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ArtifactError(f"output {folder}: holds something that is no artifact; name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise ArtifactError(f"output {folder}: cannot be written ({error.strerror}); name another folder") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once the block has succeeded."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        old = partial.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"output {folder}: cannot be written ({error})") from error
    finally:
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
    description = manifest.description
    target = torch.device(device if device is not None else manifest.device)
    if target.type != torch.device(manifest.device).type:
        raise ArtifactError(f"{folder}: compiled for {manifest.device}, not for {target}; compile again there")
    runtime = get_runtime(description.runtime)
    if runtime.suffix and (found := engine_key()) != (manifest.torch_version, manifest.platform):
        raise ArtifactError(
            f"{folder}: its engines are for torch {manifest.torch_version} on {manifest.platform}, this is torch"
            f" {found[0]} on {found[1]}; compile again here"
        )
    try:
        tensors = load_file(folder / WEIGHTS, device=str(target))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{folder / WEIGHTS}: cannot be loaded ({error})") from error
    weights = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    variants = []
    for number, facts in enumerate(manifest.variants):
        programs = {name: _read_program(folder, number, name, weights) for name in facts.programs}
        engines = {
            name: runtime.load(program, folder / _engine_file(number, name, runtime.suffix), weights)
            for name, program in programs.items()
        }
        prefix = f"timesteps/{number}/"
        timesteps = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        inputs = tuple(read_value(entry) for entry in facts.inputs)
        variants.append(Variant(inputs, target, programs, engines, timesteps))
    plans = {
        budget: Plan(Schedule(plan.recompute_steps, description.num_steps), plan.steps)
        for budget, plan in manifest.plans.items()
    }
    macs = tuple(facts.capture_macs for facts in manifest.variants)
    return Compiled(description, manifest.signature, plans, tuple(variants), macs, weights, folder / "engines")


def engine_key() -> tuple[str, str]:
    """What engines depend on: the torch version, and the processor or GPU architecture."""
    if torch.cuda.is_available():
        return torch.__version__, "cuda " + "".join(map(str, torch.cuda.get_device_capability()))
    return torch.__version__, f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _write(compiled: Compiled, folder: Path) -> None:
    suffix = get_runtime(compiled.description.runtime).suffix
    for number, variant in enumerate(compiled.variants):
        for name, program in variant.programs.items():
            file = folder / _program_file(number, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(program_to_json(program), encoding="utf-8")
            if suffix:
                engine = folder / _engine_file(number, name, suffix)
                engine.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(compiled.folder / str(number) / f"{name}{suffix}", engine)
    tensors = {f"weights/{name}": weight for name, weight in compiled.weights.items()}
    for number, variant in enumerate(compiled.variants):
        tensors |= {f"timesteps/{number}/{name}": value for name, value in variant.timesteps.items()}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    torch_version, machine = engine_key()
    manifest = _Manifest(
        format_version=FORMAT_VERSION,
        recache_version=__version__,
        torch_version=torch_version,
        platform=machine,
        device=str(compiled.variants[0].device),
        description=compiled.description,
        signature=compiled.signature,
        plans={
            budget: _Plan(recompute_steps=plan.schedule.recompute_steps, steps=plan.steps)
            for budget, plan in compiled.plans.items()
        },
        variants=tuple(
            _Variant(
                inputs=tuple(map(value_to_json, variant.inputs)), programs=tuple(variant.programs), capture_macs=macs
            )
            for variant, macs in zip(compiled.variants, compiled.capture_macs, strict=True)
        ),
        files={str(file.relative_to(folder)): _hash(file) for file in sorted(folder.rglob("*")) if file.is_file()},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


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
        return _Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: damaged at {where}: {first['msg']}; compile again") from None


class _Version(BaseModel):
    format_version: int


def _check_files(folder: Path, manifest: _Manifest) -> None:
    """Every file of the manifest is there and unchanged, and there is no other."""
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    needed = [_program_file(number, name) for number, facts in enumerate(manifest.variants) for name in facts.programs]
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


def _engine_file(number: int, name: str, suffix: str | None) -> str:
    return f"engines/{number}/{name}{suffix or ''}"
