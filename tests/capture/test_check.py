"""What would be baked in wrongly is refused before it is captured, or right afterwards; the module stays as it was."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import FasterCacheConfig, apply_layerwise_casting
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.capture.capture import capture
from recache_compile.capture.check import check_program, check_stateless, check_untouched
from recache_compile.errors import CaptureError
from tests.conftest import flux_inputs, tiny_flux

INPUTS = {"sample": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), "timestep": torch.ones(1)}


class Plain(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.linear(sample) * timestep
        return result


class Caching(Plain):
    """Gives every second call what the first one gave, as a cache in a `forward` does."""

    kept: Tensor | None = None

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.kept, result = (None, self.kept * 2) if self.kept is not None else (super().forward(sample, timestep),) * 2
        return result


def test_a_module_without_state_passes() -> None:
    module = Plain()
    check_stateless(module, INPUTS, ["sample"], "Plain")
    check_program(module, INPUTS, capture(module, INPUTS), "Plain")


def test_a_forward_that_keeps_state_is_refused() -> None:
    with pytest.raises(CaptureError, match="capture of Caching: two equal calls give different results; its forward"):
        check_stateless(Caching(), INPUTS, ["sample"], "Caching")


def test_a_program_that_computes_something_else_is_refused() -> None:
    module = Plain()
    captured = capture(module, INPUTS)
    with torch.no_grad():
        module.linear.weight = nn.Parameter(module.linear.weight + 1)
    with pytest.raises(CaptureError, match=r"capture of Plain: the program differs from the model by \d"):
        check_program(module, INPUTS, captured, "Plain")


def offloaded(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def casting(module: nn.Module) -> None:
    apply_layerwise_casting(module, torch.bfloat16, torch.float32)


def cached(module: Any) -> None:
    module.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 1, is_guidance_distilled=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (offloaded, r"is offloaded by accelerate, which cannot be traced; call remove_all_hooks\(\)"),
        (casting, r"has the hooks layerwise_casting of diffusers .* compile a pipeline that was loaded without them"),
        (cached, r"has the hooks .*faster_cache.* of diffusers .*caches: disable_cache\(\)"),
    ],
)
def test_hooks_are_refused_by_name(change: Any, message: str) -> None:
    module = tiny_flux()
    check_untouched(module, "FluxTransformer2DModel")
    change(module)
    before = dict(vars(module))
    with pytest.raises(CaptureError, match=message):
        check_untouched(module, "FluxTransformer2DModel")
    assert dict(vars(module)) == before


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match=r"torch\.autocast is on for cpu"):
        rc.compile(tiny_flux(), flux_inputs(), budgets=(2,), num_steps=4, runtime="eager", policy="uniform")
