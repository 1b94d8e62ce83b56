"""The choices of a compilation, in one record that everything else holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from recache_compile.errors import ScheduleError
from recache_compile.ir.program import Granularity


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """What engines are built for; they know no budget, policy or coefficient.

    Args:
        num_steps: length T of the denoising loop.
        anchors: most past recompute steps that a forecast reads: a forecaster of order m takes m + 1.
        granularity: "output", "stack", "block" or "module": where features are cached.
        residual: cache what the stack (or each block) adds to its input instead of what it
            returns.  None: at "block" only.
        hoist: move latents-independent work out of the steps.
        runtime: name of the backend that lowers the programs.
        dtype: of weights and latents.
        device: where the model and its inputs are.
        component: which of a pipeline's transformers is compiled ("transformer_2").
        call: arguments of the pipeline, beside the prompt, that engines are built for; the
            first where there are several.
        roles: "latents", "timestep" or "conditioning" of inputs by name, where their names do not tell.
        cuda_graphs: replay CUDA graphs instead of calling engines.
        batching: build an engine for the recompute steps of several requests at once, too.
        free_sizes: calls that differ in sizes share engines where the model's code allows it.

    Raises:
        ScheduleError: naming the choice that cannot be used.
    """

    num_steps: int = 50
    anchors: int = 2
    granularity: Granularity = Granularity.STACK
    residual: bool | None = None
    hoist: bool = True
    runtime: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    component: str = "transformer"
    call: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: bool = False
    batching: bool = False
    free_sizes: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ScheduleError(f"steps {self.num_steps}: a generation has at least one step")
        if self.anchors < 1:
            raise ScheduleError(f"anchors {self.anchors}: a forecast reads at least one")
        if self.granularity not in list(Granularity):
            known = ", ".join(Granularity)
            raise ScheduleError(f"granularity {self.granularity!r} is unknown; choose {known}")
        object.__setattr__(self, "granularity", Granularity(self.granularity))

    def resolved(self, runtime: str, dtype: str, device: str) -> "CompileConfig":
        """The same with what a compilation found."""
        return replace(self, runtime=runtime, dtype=dtype, device=device)


def changed(config: CompileConfig, **wishes: Any) -> CompileConfig:
    """The same with those choices that are not None."""
    return replace(config, **{name: wish for name, wish in wishes.items() if wish is not None})
