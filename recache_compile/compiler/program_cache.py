"""Programs and engines that were made before, on the user's disk (`support/disk_cache.py`).

Neither holds a weight's value, so that every fine-tune of a model has the same.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recache_compile.compiler.split import cache_points
from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError
from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_from_json, program_to_json
from recache_compile.runtimes.base import Runtime
from recache_compile.support.disk_cache import keep_entry, read_entry
from recache_compile.support.machine import compiling_facts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Split:
    """What a captured program becomes.

    Args:
        programs: by name.
        macs: multiply-accumulates of one call of the captured program.
    """

    programs: Mapping[str, Program]
    macs: int


def split_key(captured: Program, annotated: Program, config: CompileConfig) -> str | None:
    """What the programs of a model follow from, as a hash; None where its graph has operators that JSON does not take.

    Args:
        captured: the program.
        annotated: the same with its cache points.
        config: the choices.
    """
    try:
        text = program_to_json(captured)
    except ArtifactError:
        return None
    sites = [(node.name, str(node.args)) for node in cache_points(annotated)]
    return _hash({"captured": text, "sites": sites, "config": (config.anchors, config.hoist, config.batching)})


def read_split(key: str | None, captured: Program, device: torch.device) -> Split | None:
    """What was made of a captured program before, reading its weights; None where there is nothing."""
    parts = None if key is None else read_entry(key)
    if parts is None:
        return None
    try:
        macs, *texts = (part.decode() for part in parts)
        programs = [program_from_json(text, captured.weights, device) for text in texts]
        return Split({program.name: program for program in programs}, int(macs))
    except (ArtifactError, ValueError, IndexError, RuntimeError) as error:  # whatever else has been kept there
        log.info("programs in the cache are not used: %s", error)
        return None


def keep_split(key: str | None, captured: Program, split: Split) -> None:
    """Keep what was made of a captured program, unless it reads tensors that passes have made."""
    programs = split.programs.values()
    if key is not None and all(program.weights.keys() <= captured.weights.keys() for program in programs):
        keep_entry(key, [text.encode() for text in (str(split.macs), *map(program_to_json, programs))])


def engine_key(program: Program, runtime: Runtime, device: torch.device, facts: Mapping[str, str] | None) -> str | None:
    """What an engine follows from, as a hash; None where its runtime has none that can be kept.

    Args:
        program: that is lowered.
        runtime: that lowers it.
        device: to lower for.
        facts: the runtime's `lowering_facts` of that device.
    """
    if facts is None:
        return None
    own = {"program": program_to_json(program), "runtime": repr(runtime), "device": str(device), "facts": facts}
    return _hash(own)


def read_engine(key: str | None, files: Sequence[Path]) -> bool:
    """Put the files of an engine that was lowered before in their places; False where there is none."""
    parts = None if key is None else read_entry(key)
    if parts is None or len(parts) != len(files):
        return False
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(part)
    return True


def keep_engine(key: str | None, files: Sequence[Path]) -> None:
    """Keep the files of an engine."""
    if key is not None:
        keep_entry(key, [file.read_bytes() for file in files])


def _hash(facts: Mapping[str, object]) -> str:
    text = json.dumps({**compiling_facts(), **facts}, default=repr, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
