"""What can be made again, kept on the user's disk: whole entries only, and the longest unused go first.

programs/KEY            one entry: a line with the hash of the rest, one with the sizes of its parts, then the parts
schedules/KEY-K.json    recompute steps that the default policy has found, and what it has looked at
verified/KEY.json       files of artifacts that were found whole
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from recache_compile.errors import ArtifactError
from recache_compile.support.files import cache_folder, private_folder, writing

log = logging.getLogger(__name__)

PROGRAMS = "programs"
PARTS = (PROGRAMS, "schedules", "verified", "engines")
"""Folders of the cache; the last was one of earlier versions."""

VARIABLE = "RECACHE_CACHE_SIZE"
DEFAULT_SIZE = "8GB"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CHOSEN: ContextVar[int | None] = ContextVar("chosen", default=None)


def bytes_of(text: str) -> int:
    """A size such as "8GB" or "500 MB".

    Raises:
        ArtifactError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text.upper())
    unit = "" if found is None else found[2]
    unit = unit if unit in _UNITS else f"{unit}B"
    if found is None:
        raise ArtifactError(f"cache size {text!r}: expected a number of bytes, such as 8GB or 500MB; 0 for no cache")
    return int(float(found[1]) * _UNITS[unit])


def cache_limit() -> int:
    """The most bytes that lowered programs may take on the disk; 0: none are kept or read.

    Raises:
        ArtifactError: `RECACHE_CACHE_SIZE` is no size.
    """
    chosen = _CHOSEN.get()
    return bytes_of(os.environ.get(VARIABLE) or DEFAULT_SIZE) if chosen is None else chosen


@contextlib.contextmanager
def limited_to(size: int) -> Iterator[None]:
    """For a while, `cache_limit` is this."""
    before = _CHOSEN.set(size)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def read_entry(key: str) -> tuple[bytes, ...] | None:
    """The parts of an entry; None where it is not there, is damaged, or others could have written it."""
    if not cache_limit():
        return None
    try:
        file = private_folder(PROGRAMS) / key
        parts = _parts_of(file.read_bytes())
        os.utime(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ArtifactError) as error:
        log.info("the cache is not used: %s", error)
        return None
    return parts


def keep_entry(key: str, parts: Sequence[bytes]) -> None:
    """Keep an entry, and remove the longest unused ones beyond the limit; a disk that refuses is done without."""
    limit = cache_limit()
    if sum(map(len, parts)) > limit:
        return
    text = b"\n".join([json.dumps([len(part) for part in parts]).encode(), b"".join(parts)])
    try:
        folder = private_folder(PROGRAMS)
        with writing(folder / key) as partial:
            partial.write_bytes(_hash(text) + b"\n" + text)
        _remove_beyond(limit, folder)
    except (OSError, ArtifactError) as error:
        log.info("not kept in the cache: %s", error)


def _parts_of(entry: bytes) -> tuple[bytes, ...]:
    """What was kept; `ValueError` where anything of it has changed since."""
    expected, _, text = entry.partition(b"\n")
    if _hash(text) != expected:
        raise ValueError("an entry's hash differs")
    head, _, rest = text.partition(b"\n")
    sizes = json.loads(head)
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("an entry's sizes are none")
    if sum(sizes) != len(rest):
        raise ValueError("an entry's parts do not fill it")
    ends = list(itertools.accumulate(sizes))
    return tuple(rest[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _remove_beyond(limit: int, folder: Path) -> None:
    """Remove the longest unused entries until the others fit; other processes may do the same."""
    found: list[tuple[float, int, Path]] = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            facts = file.stat()
            found.append((facts.st_mtime, facts.st_size, file))
    taken = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if taken <= limit:
            return
        file.unlink(missing_ok=True)
        taken -= size


@dataclass(frozen=True, slots=True)
class CachePart:
    """What one folder of the cache holds.

    Args:
        name: of the folder.
        entries: number of files.
        size: their bytes.
    """

    name: str
    entries: int
    size: int


def parts_of_cache() -> tuple[CachePart, ...]:
    """What is on the disk, by folder; those that are not there are left out."""
    parts = []
    for name in PARTS:
        sizes = []
        for file in (cache_folder() / name).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                sizes += [file.stat().st_size] if file.is_file() else []
        parts += [CachePart(name, len(sizes), sum(sizes))] if sizes else []
    return tuple(parts)


def clear_cache() -> None:
    """Remove all of it; what else lies in that folder stays.

    Raises:
        ArtifactError: something cannot be removed.
    """
    for name in PARTS:
        folder = cache_folder() / name
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be removed ({error.strerror})") from None
