"""Dataclasses as JSON files; a folder's own record says what work it belongs to."""

import json
from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from recache_compile.errors import ArtifactError
from recache_compile.support.files import writing

T = TypeVar("T")


def write_record(record: Any, file: Path) -> None:
    """Write a dataclass, whole or not at all.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with writing(file) as partial:
        partial.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def read_record(file: Path, kind: type[T], remedy: str) -> T:
    """A dataclass from its file.

    Args:
        file: that `write_record` wrote.
        kind: of dataclass.
        remedy: for people whose file is not there or damaged.

    Raises:
        ArtifactError: the file is not there, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ArtifactError(f"{file}: cannot be read ({reason}); {remedy}") from None


def facts_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, those of dataclasses inside beside the others."""
    facts: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        facts |= facts_of(value) if is_dataclass(value) else {each.name: value}
    return facts


def check_folder(record: Any, before: Any | None, folder: Path, what: str, free: Collection[str] = ()) -> bool:
    """Whether a folder holds the work that a record is about; False: the folder is free for it.

    Args:
        record: what shall be done there.
        before: the folder's own record; None where it has none.
        folder: in question.
        what: an article and the word for such work.
        free: fields that may change while work goes on.

    Raises:
        ArtifactError: the folder holds other work, or something else.
    """
    if before is not None:
        now, then = facts_of(record), facts_of(before)
        if names := [name for name, value in now.items() if name not in free and then[name] != value]:
            raise ArtifactError(
                f"output {folder}: holds {what} with another {' and '.join(names)}; name another folder"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        noun = what.rpartition(" ")[2]
        raise ArtifactError(f"output {folder}: holds something that is no {noun}; name another folder")
    return False
