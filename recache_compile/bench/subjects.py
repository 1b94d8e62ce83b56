"""Who is measured: the model itself, ours, and the caches of `diffusers` and `cache-dit`."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.bench.workload import BenchRequest, Workload, peers_schedule
from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import ModelError
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.program import MIN_ROWS
from recache_compile.ir.schedule import Schedule
from recache_compile.support.disk_cache import limited_to


class Subject(Protocol):
    """One way to run the loop, alone in its process."""

    def begin(self) -> None:
        """A new generation, with new conditioning."""
        ...

    def step(self, step: int) -> Any:
        """One model call."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What else is to be told of it."""
        ...


class Plain:
    """The module as it is, or with `torch.compile`."""

    def __init__(self, workload: Workload, compiled: bool) -> None:
        self._workload = workload
        self._call: Callable[..., Any] = torch.compile(workload.module) if compiled else workload.module

    def begin(self) -> None:
        """New conditioning."""
        renew(self._workload)

    def step(self, step: int) -> Any:
        """One model call."""
        return self._call(**self._workload.at(step), return_dict=False)

    def facts(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}


class Ours:
    """Compiled, saved, loaded: what a server runs, without the original; `alone` calls its engines on their own."""

    def __init__(self, workload: Workload, request: BenchRequest, schedule: Schedule) -> None:
        self._workload = replace(workload, module=nn.Identity())
        self._folder = tempfile.TemporaryDirectory(prefix="recache-bench-")
        artifact = Path(request.model if request.is_artifact else self._folder.name)
        if not request.is_artifact:
            with limited_to(0):  # the first time counts
                engines = rc.build_engines(workload.module, [workload.example], request.config)
            engines.with_plans({request.budget: schedule}, Taylor(request.order)).save(artifact)
        self._compiled = rc.load(artifact, device=request.device)
        self._bytes = folder_bytes(artifact)
        self._run = self._compiled.dispatcher(request.budget)
        self.alone = lone_calls(self._compiled, request.budget)

    def begin(self) -> None:
        """New conditioning: every generation pays for its prologue."""
        renew(self._workload)
        self._run.reset()

    def step(self, step: int) -> Any:
        """One engine call, and before the first the prologue."""
        return self._run(step=step, **self._workload.at(step))

    def facts(self) -> Mapping[str, Any]:
        """Bytes on disk, those of the weights, and the runtime."""
        weights = sum(weight.nbytes for weight in self._compiled.weights.values())
        return {"disk_bytes": self._bytes, "weight_bytes": weights, "runtime": self._compiled.engines.config.runtime}


ATTENTION = r"(transformer_|single_transformer_|temporal_transformer_)?blocks.*attn\d?"
"""The attention of all blocks.

Those of `diffusers` are the same without the number: they miss attn1 and attn2, and leave a model that
has those, Wan for one, uncached.
"""


class TaylorSeer:
    """`TaylorSeerCacheConfig` of `diffusers`, whole or lite, with and without `torch.compile`."""

    def __init__(self, workload: Workload, request: BenchRequest, lite: bool, compiled: bool) -> None:
        from diffusers import TaylorSeerCacheConfig

        self._schedule, warmup, interval = peers_schedule(request.num_steps, request.budget)
        self._workload = workload
        module: Any = workload.module
        if not hasattr(module, "enable_cache"):
            raise ModelError(f"{type(module).__name__} has no enable_cache in diffusers")
        module.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=warmup,
                max_order=request.order,
                taylor_factors_dtype=next(module.parameters()).dtype,
                cache_identifiers=None if lite else [ATTENTION],
                use_lite_mode=lite,
            )
        )
        self._call = torch.compile(module) if compiled else module

    def begin(self) -> None:
        """Forget the last generation."""
        renew(self._workload)
        module: Any = self._workload.module
        module._reset_stateful_cache()

    def step(self, step: int) -> Any:
        """One model call in the context that the pipelines of `diffusers` use."""
        module: Any = self._workload.module
        with module.cache_context("cond"):
            return self._call(**self._workload.at(step), return_dict=False)

    def facts(self) -> Mapping[str, Any]:
        """Its recompute steps, which an artifact need not have."""
        return {"recompute_steps": self._schedule.recompute_steps}


class CacheDit:
    """`cache-dit` with a static mask and its TaylorSeer calibrator, with and without `torch.compile`."""

    def __init__(self, workload: Workload, request: BenchRequest, schedule: Schedule, compiled: bool) -> None:
        import cache_dit

        self._workload, self._package, self._num_steps = workload, cache_dit, request.num_steps
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            num_inference_steps=request.num_steps,
            steps_computation_mask=[int(flag) for flag in schedule.mask],
            steps_computation_policy="static",
            enable_separate_cfg=False,  # the loop makes one model call a step, of any model
        )
        target: Any = workload.module
        joint = type(target).__name__ == "SD3Transformer2DModel"  # known by its pipeline alone
        if joint:
            blocks, pattern = target.transformer_blocks, cache_dit.ForwardPattern.Pattern_1
            target = cache_dit.BlockAdapter(transformer=target, blocks=blocks, forward_pattern=pattern)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=request.order,
            enable_encoder_calibrator=not joint,  # its last block returns no text
        )
        cache_dit.enable_cache(target, cache_config=config, calibrator_config=calibrator)
        if compiled:
            cache_dit.set_compile_configs()
        self._call: Callable[..., Any] = torch.compile(workload.module) if compiled else workload.module

    def begin(self) -> None:
        """Forget the last generation."""
        renew(self._workload)
        self._package.refresh_context(self._workload.module, num_inference_steps=self._num_steps)

    def step(self, step: int) -> Any:
        """One model call."""
        return self._call(**self._workload.at(step), return_dict=False)

    def facts(self) -> Mapping[str, Any]:
        """Its version."""
        return {"version": str(self._package.__version__)}


OURS = "recache-compile"

SUBJECTS: dict[str, Callable[[Workload, BenchRequest, Schedule], Subject]] = {
    "eager": lambda workload, request, schedule: Plain(workload, compiled=False),
    "torch.compile": lambda workload, request, schedule: Plain(workload, compiled=True),
    OURS: Ours,
    "diffusers TaylorSeer": lambda workload, request, schedule: TaylorSeer(workload, request, False, False),
    "diffusers TaylorSeer + torch.compile": lambda workload, request, schedule: TaylorSeer(
        workload, request, False, True
    ),
    "diffusers TaylorSeer lite": lambda workload, request, schedule: TaylorSeer(workload, request, True, False),
    "diffusers TaylorSeer lite + torch.compile": lambda workload, request, schedule: TaylorSeer(
        workload, request, True, True
    ),
    "cache-dit": lambda workload, request, schedule: CacheDit(workload, request, schedule, False),
    "cache-dit + torch.compile": lambda workload, request, schedule: CacheDit(workload, request, schedule, True),
}
"""By the name that tables show; the first two recompute every step."""

UNCACHED = ("eager", "torch.compile")


def available() -> tuple[str, ...]:
    """Names of those whose packages are installed."""
    return tuple(name for name in SUBJECTS if not name.startswith("cache-dit") or find_spec("cache_dit"))


def chosen_subjects(only: str | None) -> tuple[str, ...]:
    """Names of those to measure.

    Args:
        only: names, separated by commas; None: all that are installed.

    Raises:
        ModelError: one is unknown.
    """
    names = available() if only is None else tuple(part.strip() for part in only.split(","))
    for name in names:
        if name not in SUBJECTS:
            raise ModelError(f"only {name!r}: unknown; choose among {', '.join(SUBJECTS)}")
    return names


def lone_calls(compiled: Compiled, budget: int) -> dict[str, Callable[[], Any]]:
    """Calls of the engines on random inputs, of which the ideal is made; the tables have the rows of a budget."""
    variant = compiled.variants[0]
    rows = {"recompute": budget, "forecast": compiled.num_steps - budget}

    def call(name: str) -> Callable[[], Any]:
        shapes = [
            [max(rows[value.table or name], MIN_ROWS) if size is None else size for size in value.shape]
            for value in variant.programs[name].inputs
        ]
        inputs = [
            torch.rand(shape, device=variant.device).to(value.dtype)
            for shape, value in zip(shapes, variant.programs[name].inputs, strict=True)
        ]
        return lambda: variant.engines[name](inputs)

    return {name: call(name) for name in ("recompute", "prologue") if name in variant.programs}


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def renew(workload: Workload) -> None:
    """Other conditioning than in the generation before, in place, so that nothing is taken for known."""
    for name, value in workload.inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith(("_ids", "timestep")):
            with contextlib.suppress(RuntimeError):  # inference tensors
                value.add_(0.01)
