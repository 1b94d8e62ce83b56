"""LoRA adapters are fused before capturing, and the module keeps them."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from recache_compile.capture.adapters import adapted_layers, changed_weights, fused_adapters, merge
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, tiny_flux


def with_lora() -> FluxTransformer2DModel:
    """`tiny_flux` with an adapter that changes its result."""
    module = tiny_flux()
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_mlp", "linear"]
    )
    module.add_adapter(config)
    return module.eval()


def test_the_adapter_is_compiled_in() -> None:
    module, inputs = with_lora(), flux_inputs()
    expected = module(**inputs, return_dict=False)[0]
    assert not torch.allclose(expected, tiny_flux()(**inputs, return_dict=False)[0], atol=1e-3)
    compiled = compile_flux(module)
    torch.testing.assert_close(compiled.dispatcher(NUM_STEPS)(step=0, **inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_adapter_is_left_in_the_programs() -> None:
    compiled, plain = compile_flux(with_lora()), compile_flux(tiny_flux())
    assert set(compiled.weights) == set(plain.weights)
    for name, program in plain.variants[0].programs.items():
        assert compiled.variants[0].programs[name].num_calls == program.num_calls


class Several(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.embedding = nn.Linear(6, 4), nn.Conv2d(3, 4, 2), nn.Embedding(5, 6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_layers_of_every_kind_are_merged_as_peft_does(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    names = ["linear", "conv", "embedding"]
    module = inject_adapter_in_model(
        LoraConfig(r=2, init_lora_weights=False, target_modules=names, **options), Several()
    )
    layers = adapted_layers(module)
    assert list(layers) == names
    for layer in layers.values():
        expected = copy.deepcopy(layer)
        expected.merge()
        before = {name: each.detach().clone() for name, each in layer.base_layer.named_parameters()}
        after = {name: torch.empty_like(before[name]) for name in changed_weights(layer)}
        merge(layer, 1.0, {name: before[name] for name in after}, after)
        torch.testing.assert_close(after["weight"], expected.base_layer.weight)
        assert not torch.allclose(after["weight"], before["weight"])
        assert all(torch.equal(each, before[name]) for name, each in layer.base_layer.named_parameters())


def test_the_module_keeps_its_adapter() -> None:
    module = with_lora()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    result = module(**flux_inputs(), return_dict=False)[0]
    compile_flux(module)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert torch.equal(module(**flux_inputs(), return_dict=False)[0], result)


def test_a_disabled_adapter_is_left_out() -> None:
    module, inputs = with_lora(), flux_inputs()
    module.disable_adapters()
    with fused_adapters(module):
        fused = module(**inputs, return_dict=False)[0]
    assert torch.equal(fused, tiny_flux()(**inputs, return_dict=False)[0])


def test_a_plain_module_is_left_alone() -> None:
    module = tiny_flux()
    children = dict(module.named_modules())
    with fused_adapters(module):
        assert dict(module.named_modules()) == children


def test_other_weights_of_the_same_shapes_go_in_without_compiling() -> None:
    compiled, other, inputs = compile_flux(with_lora()), tiny_flux(seed=3), flux_inputs()
    compiled.refit(other.state_dict())
    torch.testing.assert_close(
        compiled.dispatcher(NUM_STEPS)(step=0, **inputs)[0],
        other(**inputs, return_dict=False)[0],
        atol=1e-5,
        rtol=1e-5,
    )
