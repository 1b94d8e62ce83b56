"""The manifest of an artifact: its facts, and the hash of every other file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from recache_compile.artifact.asks import StoredPolicy
from recache_compile.artifact.verify import check_links, files_in
from recache_compile.compiler.compiled import Description
from recache_compile.errors import ArtifactError
from recache_compile.ir.plan import StepPlan
from recache_compile.ir.signature import Signature

FORMAT_VERSION = 7
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ForecasterFacts(_Facts):
    """What fills the cached steps; `gram` is what `fitted` was fitted to (T, T), empty for the others."""

    name: str
    order: int
    gram: tuple[tuple[float, ...], ...] = ()


class StoredPlan(_Facts):
    """What each step of a budget runs."""

    recompute_steps: tuple[int, ...]
    steps: tuple[StepPlan, ...]


class StoredVariant(_Facts):
    """One kind of calls; `conditions` must hold of free sizes."""

    inputs: tuple[dict[str, Any], ...]
    constants: tuple[tuple[str, str], ...]
    programs: tuple[str, ...]
    macs: int
    conditions: tuple[str, ...]


class Manifest(_Facts):
    """What an artifact is.

    Args:
        requirements: library versions and hardware that its engines fit; empty: any.
        device: what its engines run on.
        policy: where the schedules came from.
        asks: what other budgets are asked of, where that could be stored.
        files: hash of every other file, by its place in the folder.
        digest: hash of all that the manifest says.
    """

    format_version: Literal[7]
    recache_version: str
    requirements: dict[str, str]
    device: str
    description: Description
    signature: Signature
    forecaster: ForecasterFacts
    policy: str
    asks: StoredPolicy | None
    plans: dict[int, StoredPlan]
    variants: tuple[StoredVariant, ...]
    files: dict[str, str]
    digest: str


class _Version(BaseModel):
    format_version: int


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write it with its digest."""
    facts = json.loads(manifest.model_dump_json())
    (folder / MANIFEST).write_text(signed(facts), encoding="utf-8")


def signed(facts: Mapping[str, Any]) -> str:
    """The text of a manifest, with its digest."""
    text = json.dumps({**facts, "digest": ""}, indent=1)
    head, _, tail = text.rpartition('""')
    return f'{head}"{_digest(text)}"{tail}'


def _digest(text: str) -> str:
    """Hash of a manifest's text, in which its own digest is empty."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        ArtifactError: there is none, it is damaged, or its format is not this version's.
    """
    file = folder / MANIFEST
    check_links(folder, [file.name])
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
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
        manifest = Manifest.model_validate_json(text)
        if manifest.digest != _digest(text.replace(manifest.digest, "", 1)):
            raise ArtifactError(f"{file}: damaged (its digest differs); compile again")
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: damaged at {where}: {first['msg']}; compile again") from None


def is_artifact(folder: Path, alone: bool = False) -> bool:
    """Whether a folder holds an artifact's files, whole or not, and nothing else.

    Args:
        folder: in question.
        alone: not even what the Hub adds.
    """
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *facts["files"]} if "recache_version" in facts else set()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return files_in(folder, alone) <= listed
