"""Programs and engines that were made before, on the user's disk (`support/disk_cache.py`).

Neither holds a weight's value, so that every fine-tune of a model has the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    return _hash({"captured": text, "sites": sites, "config": (config.num_steps, config.anchors, config.hoist)})


def read_programs(key: str | None, captured: Program, device: torch.device) -> dict[str, Program] | None:
    """The programs that were made of a captured one before, which read its weights; None where there are none."""
    parts = None if key is None else read_entry(key)
    if parts is None:
        return None
    programs = [program_from_json(part.decode(), captured.weights, device) for part in parts]
    return {program.name: program for program in programs}


def keep_programs(key: str | None, captured: Program, programs: Mapping[str, Program]) -> None:
    """Keep what was made of a captured program, unless it reads tensors that passes have made."""
    if key is not None and all(program.weights.keys() <= captured.weights.keys() for program in programs.values()):
        keep_entry(key, [program_to_json(program).encode() for program in programs.values()])


def engine_key(program: Program, runtime: Runtime, device: torch.device) -> str | None:
    """What an engine follows from, as a hash; None where its runtime has none that can be kept."""
    facts = runtime.lowering_facts(device)
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
