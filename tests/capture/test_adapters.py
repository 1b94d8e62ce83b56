"""LoRA adapters are fused before capturing, and the module keeps them."""

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from recache_compile.capture.adapters import fused_adapters
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
