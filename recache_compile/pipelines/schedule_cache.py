"""What the default policy has found for `accelerate` before, on the user's disk.

schedules/KEY-K.json         recompute steps of budget K, for one model, its calls, choices and versions
schedules/KEY.safetensors    the statistics that other budgets are asked of
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.capture.adapters import adapter_scale, fused_adapters
from recache_compile.capture.roles import usual_role
from recache_compile.compiler.compiled import Compiled
from recache_compile.compiler.examples import Example
from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError, ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import load_calibration, save_calibration
from recache_compile.runtimes.base import Runtime
from recache_compile.support.files import private_folder, writing
from recache_compile.support.machine import compiling_facts

log = logging.getLogger(__name__)


def key_of(module: nn.Module, examples: Sequence[Example], config: CompileConfig, runtime: Runtime) -> str:
    """What a schedule was found for, as one hash: weights and all.

    Args:
        module: the model.
        examples: calls that engines were built for; values of timesteps count, and of what else
            a model may decide by (whole numbers and truth values).
        config: the choices.
        runtime: the backend.

    All weights are read for it, as the adapters that are active make them; that takes about two
    seconds a gigabyte.
    """
    digest = hashlib.sha256()
    facts = {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "model": dict(getattr(module, "config", {})),
        "config": asdict(config),
        "attention": {name: repr(vars(each)) for name, each in getattr(module, "attn_processors", {}).items()},
        "runtime": repr(runtime),
        "device": str(examples[0].device),
        "requirements": dict(runtime.build_requirements(examples[0].device)),
        "compiling": compiling_facts(),
        "roles": [example.roles for example in examples],
        "processors": [example.attention for example in examples],
    }
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    for example in examples:
        _add(digest, example.timesteps.items(), values=True)
        for inputs in (example.inputs, *example.others):
            _add(digest, named_leaves(inputs).items())
    for code in _sources_of(module):
        digest.update(code.read_bytes())
    with fused_adapters(
        module, adapter_scale(call for example in examples for call in (example.inputs, *example.others))
    ):
        _add(digest, module.state_dict().items(), values=True)
        _add(digest, module.named_buffers(), values=True)
    return digest.hexdigest()[:32]


def _sources_of(module: nn.Module) -> list[Path]:
    """The file with the model's class, where there is one."""
    try:
        return [Path(inspect.getfile(type(module)))]
    except (TypeError, OSError):
        return []


def _add(digest: Any, leaves: Iterable[tuple[str, Any]], values: bool = False) -> None:
    for name, leaf in leaves:
        digest.update(f"{name}:".encode())
        if not isinstance(leaf, Tensor):
            digest.update(repr(leaf).encode())
            continue
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        if values or not leaf.is_floating_point() or usual_role(name) is Kind.TIMESTEP:
            dense = leaf.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)  # expanded ones as well
            digest.update(dense.view(torch.uint8).numpy().tobytes())


def known_schedule(key: str, budget: int, num_steps: int) -> Schedule | None:
    """The schedule that was found before for these engines."""
    try:
        steps = json.loads(_schedule_file(key, budget).read_text(encoding="utf-8"))
        schedule = Schedule(tuple(steps), num_steps)
    except (OSError, ValueError, TypeError, ArtifactError, ScheduleError):
        return None
    return schedule if schedule.budget == budget else None


def known_calibration(key: str, num_steps: int) -> Calibration | None:
    """The calibration that was made before for these engines."""
    try:
        found = load_calibration(_calibration_file(key))
    except ArtifactError:
        return None
    return found if found.num_steps == num_steps else None


def keep_schedules(key: str, compiled: Compiled) -> None:
    """Remember the schedules and the calibration of engines; a disk that cannot be written to is done without."""
    try:
        for budget, schedule in compiled.schedules.items():
            with writing(_schedule_file(key, budget)) as partial:
                partial.write_text(json.dumps(schedule.recompute_steps), encoding="utf-8")
        if compiled.planner.calibration is not None:
            save_calibration(compiled.planner.calibration, _calibration_file(key))
    except ArtifactError as error:
        log.info("schedules are not kept: %s", error)


def _calibration_file(key: str) -> Path:
    return private_folder("schedules") / f"{key}.safetensors"


def _schedule_file(key: str, budget: int) -> Path:
    return private_folder("schedules") / f"{key}-{budget}.json"
