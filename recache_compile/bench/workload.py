"""What is measured: a model, the arguments of one call, and the steps that are recomputed."""

import ast
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.artifact.manifest import MANIFEST
from recache_compile.artifact.specs import find_spec_file, read_spec, transformer_class
from recache_compile.artifact.store import check, look
from recache_compile.compiler.examples import Example
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.value import ROLES, Kind
from recache_compile.runtimes.registry import get_runtime

WARMUPS = (1, 2, 3)
"""Numbers of first steps that peers are allowed to recompute one after another."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What the user asked for; small, so that every process can be told.

    Args:
        model: a spec's name or file, what `load_pipeline` takes, or an artifact's folder.
        budget: recompute steps k.
        config: T, the order of the forecasts (m + 1 anchors), our runtime, where all of it runs
            and in which type, arguments of the pipeline.
        threads: of a process; 0: as many as there are cores.
    """

    model: str
    budget: int
    config: CompileConfig
    threads: int = 0

    @property
    def num_steps(self) -> int:
        """Length T of the loop."""
        return self.config.num_steps

    @property
    def order(self) -> int:
        """Polynomial order m of the forecasts."""
        return self.config.anchors - 1

    @property
    def device(self) -> torch.device:
        """Where all of it runs."""
        return torch.device(self.config.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and latents."""
        return getattr(torch, self.config.dtype)

    @property
    def is_artifact(self) -> bool:
        """Whether the model is an artifact."""
        return (Path(self.model) / MANIFEST).is_file()


@dataclass(frozen=True, slots=True)
class Workload:
    """A model on its device and one call of it.

    Args:
        module: the transformer, with random weights where only its shape is known.
        example: the call, with its timetable.
    """

    module: nn.Module
    example: Example

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Arguments of the call."""
        return self.example.inputs

    def at(self, step: int) -> dict[str, Any]:
        """The arguments of one step."""
        return dict(self.inputs) | {name: column[step] for name, column in self.example.timesteps.items()}


def peers_schedule(num_steps: int, budget: int) -> tuple[Schedule, int, int]:
    """The recompute steps that TaylorSeer in `diffusers` can have, so that all can have the same.

    With w warm-up steps and interval N it recomputes 0..w-1 and w+1, w+1+N, ...

    Returns:
        The schedule, w and N.

    Raises:
        ModelError: no w in 1..3 and N recompute that many steps.
    """
    for warmup in WARMUPS:
        for interval in range(1, num_steps + 1):
            steps = sorted({*range(warmup), *range(warmup + 1, num_steps, interval)})
            if len(steps) == budget:
                return Schedule(tuple(steps), num_steps), warmup, interval
    raise ModelError(
        f"budget {budget} of {num_steps} steps: no interval of TaylorSeer recomputes that many; choose another"
    )


def make_request(
    model: str, config: CompileConfig, num_steps: int | None, budget: int | None, threads: int = 0
) -> tuple[BenchRequest, Schedule]:
    """A request, every choice checked, and the steps that everyone recomputes.

    Args:
        model: what is measured.
        config: the choices.
        num_steps, budget: those that the user stated; None: the usual, or the artifact's.
        threads: of a process.

    Raises:
        RecacheError: naming the choice that cannot be used.
    """
    request = BenchRequest(model, budget or 5, config, threads)
    if request.is_artifact:
        return of_artifact(request, num_steps, budget)
    request = replace(request, config=replace(config, runtime=get_runtime(config.runtime).name))
    schedule, _, _ = peers_schedule(request.num_steps, request.budget)
    return request, schedule


def of_artifact(request: BenchRequest, num_steps: int | None, budget: int | None) -> tuple[BenchRequest, Schedule]:
    """The request that an artifact can serve, and its schedule.

    Args:
        request: names the artifact.
        num_steps: that were asked for, or None.
        budget: that was asked for; None: the smallest.

    Raises:
        ModelError: it was compiled for others.
    """
    manifest = check(Path(request.model))
    config, budgets = manifest.description.config, sorted(manifest.plans)
    chosen = budgets[0] if budget is None else budget
    if chosen not in budgets or num_steps not in (None, config.num_steps):
        raise ModelError(
            f"{request.model}: was compiled for {config.num_steps} steps and budgets {', '.join(map(str, budgets))};"
            " ask for those, or leave --steps and --budget out"
        )
    config = replace(config, device=request.config.device, anchors=manifest.forecaster.order + 1)
    schedule = Schedule(manifest.plans[chosen].recompute_steps, config.num_steps)
    return replace(request, budget=chosen, config=config), schedule


def make_workload(request: BenchRequest) -> Workload:
    """Load or make the model and its inputs.

    Raises:
        ModelError: there is no such model.
    """
    torch.manual_seed(0)
    if request.is_artifact:
        return _of_artifact(request)
    file = find_spec_file(request.model)
    return _of_spec(request, file) if file is not None else _of_pipeline(request)


def _of_spec(request: BenchRequest, file: Path) -> Workload:
    """A model with random weights."""
    known = read_spec(file)
    dtype, device = request.dtype, request.device
    with _defaults(dtype, device):
        cls: Any = type(known.module)
        module = cls.from_config(known.module.config).eval().requires_grad_(False)
    inputs = pytree.tree_map_only(
        Tensor, lambda tensor: _draw(tensor.shape, _cast(tensor.dtype, dtype), device), known.example.inputs
    )
    return Workload(module, Example(inputs, _timetable(inputs, request.num_steps)))


def _of_pipeline(request: BenchRequest) -> Workload:
    from recache_compile.pipelines.load import load_pipeline
    from recache_compile.pipelines.record import record_examples

    pipeline: Any = load_pipeline(request.model, request.dtype, request.device)
    return Workload(pipeline.transformer, record_examples(pipeline, request.num_steps, request.config.call)[0])


def _of_artifact(request: BenchRequest) -> Workload:
    """The model that an artifact was compiled from: its class and configuration, with the weights that it holds."""
    compiled = look(request.model)
    facts, this = compiled.description, compiled.variants[0]
    device = request.device
    module = transformer_class(facts.model_class.rpartition(".")[2])(**{
        name: value for name, value in facts.model_config.items() if not name.startswith("_")
    }).eval()  # fmt: skip
    module.load_state_dict(compiled.weights, strict=False)
    if this.fixed or any("." in value.name for value in this.inputs):
        raise ModelError(f"{request.model}: was compiled for inputs that cannot be made up; bench the model instead")
    inputs: dict[str, Any] = {
        value.name: value.shape[0] if value.kind is Kind.SHAPE else _draw(value.shape, value.dtype, device)
        for value in this.inputs
    }
    for name, text in this.constants:
        if name != "return_dict":
            inputs[name] = ast.literal_eval(text)
    timetable = dict(this.timesteps) or _timetable(inputs, request.num_steps)
    roles = {value.name: value.kind for value in this.inputs if value.kind in ROLES}
    return Workload(module.to(device, getattr(torch, facts.config.dtype)), Example(inputs, timetable, roles))


@contextlib.contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Constructors make tensors of this type, there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _cast(given: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if given in (torch.bfloat16, torch.float16) else given


def _draw(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of the right type: normal, zero for whole numbers, true for masks."""
    if dtype is torch.bool:
        return torch.ones(tuple(shape), dtype=dtype, device=device)
    if not dtype.is_floating_point:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.randn(tuple(shape), device=device).to(dtype)


def _timetable(inputs: Mapping[str, Any], num_steps: int) -> dict[str, Tensor]:
    """Falling values for the input named timestep."""
    name = "timestep"
    if not isinstance(inputs.get(name), Tensor):
        return {}
    value = inputs[name]
    high = 1.0 if value.is_floating_point() else 1000.0
    column = torch.linspace(high, high / num_steps, num_steps, device=value.device)
    return {name: column.reshape(-1, *[1] * value.dim()).expand(-1, *value.shape).to(value.dtype).contiguous()}
