"""Adapters change on a pipeline that runs on engines as on a plain one, and nothing is compiled for it."""

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import recache_compile as rc
from recache_compile.capture.adapters import merge
from recache_compile.compiler.lowering import Lowering
from recache_compile.errors import CaptureError, MismatchError, ModelError
from recache_compile.pipelines.adapters import adapters_of
from recache_compile.pipelines.lora import _reads_files
from recache_compile.pipelines.transformer import CompiledTransformer
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, timesteps, tiny_flux
from tests.families import BUDGET, DIFFERENT, EXACT, STEPS, TINY, error, family
from tests.tiny_pipelines import draw

FAMILIES = ("flux", "sd3", "wan-2.1")
KWARGS = {"flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs", "wan-2.1": "attention_kwargs"}
TARGETS = {"a": ["to_q", "to_v"], "b": ["to_v", "to_out.0", "proj_out"]}

Change = Callable[[Any, Path], None]


def lora(name: str, adapter: str, folder: Path, **options: Any) -> Path:
    """A LoRA for the transformer of a tiny pipeline, as diffusers saves it."""
    pipeline = TINY[name].make()
    torch.manual_seed(ord(adapter))
    settings = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": TARGETS[adapter]}
    config = LoraConfig(**settings | options)
    pipeline.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.transformer)
    place = folder / f"{name}-{adapter}"
    metadata = {"transformer_lora_adapter_metadata": pipeline.transformer.peft_config["default"].to_dict()}
    type(pipeline).save_lora_weights(place, transformer_lora_layers=layers, **metadata)
    return place


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """LoRAs a and b for each of the tiny pipelines."""
    folder = tmp_path_factory.mktemp("loras")
    return {(name, adapter): lora(name, adapter, folder) for name in FAMILIES for adapter in TARGETS}


def load(pipeline: Any, place: Path, name: str, **options: Any) -> None:
    """Load a LoRA as users do."""
    pipeline.load_lora_weights(place, adapter_name=name, weight_name="pytorch_lora_weights.safetensors", **options)


def both(name: str) -> tuple[Any, Any]:
    """A pipeline on engines and a plain one of the same weights."""
    return family(name).pipeline(), TINY[name].make()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_does_what_it_does_to_the_plain_pipeline(name: str, loras: dict[tuple[str, str], Path]) -> None:
    ours, theirs = both(name)
    call, argument = TINY[name].call(0), KWARGS[name]
    base = draw(ours, call, STEPS)
    seen: list[Tensor] = [base]

    def same(do: Callable[[Any], Any], changes: bool = True, **options: Any) -> None:
        do(ours), do(theirs)
        found = draw(ours, call, STEPS, **options)
        assert error(found, draw(theirs, call, STEPS, **options)) <= EXACT
        assert not changes or error(found, seen[-1]) >= DIFFERENT
        seen.append(found)

    same(lambda pipe: load(pipe, loras[name, "a"], "a"))
    same(lambda pipe: load(pipe, loras[name, "b"], "b"))
    same(lambda pipe: pipe.set_adapters(["a", "b"], [0.7, -0.4]))
    assert ours.get_active_adapters() == ["a", "b"]
    assert ours.get_list_adapters() == {"transformer": ["a", "b"]}
    same(lambda pipe: None, **{argument: {"scale": 0.5}})
    same(lambda pipe: None)
    same(lambda pipe: pipe.set_adapters("b", 2.0))
    same(lambda pipe: pipe.fuse_lora(lora_scale=0.8))
    assert (ours.num_fused_loras, ours.fused_loras) == (1, {"b"})
    same(lambda pipe: pipe.unfuse_lora(), changes=False)
    assert ours.num_fused_loras == 0
    same(lambda pipe: pipe.disable_lora())
    assert torch.equal(seen[-1], base)
    same(lambda pipe: pipe.enable_lora())
    same(lambda pipe: pipe.delete_adapters("b"))
    same(lambda pipe: pipe.set_adapters("a"))
    same(lambda pipe: pipe.unload_lora_weights())
    assert torch.equal(seen[-1], base)


def test_back_to_none_the_module_and_the_engines_have_their_own_weights(loras: dict[tuple[str, str], Path]) -> None:
    tiny = TINY["flux"]
    pipeline = tiny.make()
    transformer = pipeline.transformer
    compiled = rc.compile(
        pipeline, call=tiny.call(0), num_steps=STEPS, budgets=(BUDGET, STEPS), policy="uniform", runtime="eager"
    )
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in transformer.state_dict().items()}
    rc.accelerate(pipeline, compiled, STEPS)
    base = draw(pipeline, tiny.call(0), STEPS)
    for fuse in (False, True):
        load(pipeline, loras["flux", "a"], "a")
        if fuse:
            pipeline.fuse_lora()
            draw(pipeline, tiny.call(0), STEPS)
            pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
        assert torch.equal(draw(pipeline, tiny.call(0), STEPS), base)
        after = transformer.state_dict()
        assert list(after) == list(before)
        for name, (pointer, weight) in before.items():
            assert after[name].data_ptr() == pointer
            assert torch.equal(after[name], weight)
    assert rc.restore(pipeline).transformer is transformer


def on_engines(compiled: rc.Compiled, original: torch.nn.Module | None = None) -> CompiledTransformer:
    """A transformer on engines, its original beside, in a loop without a pipeline."""
    loop = SimpleNamespace(scheduler=SimpleNamespace(timesteps=timesteps()[:, 0]))
    return CompiledTransformer(compiled, loop, NUM_STEPS, original)


def generate(transformer: Any, **options: Any) -> Tensor:
    """Predictions of all steps."""
    inputs = [loop_inputs(step, flux_inputs()) for step in range(NUM_STEPS)]
    return torch.stack([transformer(**each, **options, return_dict=False)[0] for each in inputs])


def anew(module: torch.nn.Module) -> Tensor:
    """What a compilation of a module with its adapters gives."""
    return generate(on_engines(compile_flux(module)))


def add(module: Any, name: str, seed: int, **options: Any) -> None:
    """Put a random adapter into a module."""
    torch.manual_seed(seed)
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["to_q", "to_v", "proj_mlp", "linear"]}
    module.add_adapter(LoraConfig(**config | options), name)


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


@pytest.fixture(scope="module")
def compiled_anew() -> dict[str, Tensor]:
    """What compilations give: without adapters, with a, with b."""
    with torch.no_grad():
        other = tiny_flux()
        found = {"base": anew(other)}
        for seed, name in enumerate("ab"):
            add(other, name, seed)
            other.set_adapters([name], [1.5])
            found[name] = anew(other)
        return found


@pytest.mark.parametrize("runtime", ["eager", pytest.param("inductor", marks=pytest.mark.slow), "onnxruntime"])
def test_a_hundred_swaps_take_no_memory_and_no_compilation(
    runtime: str,
    compiled_anew: dict[str, Tensor],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: rc.Compiled = request.getfixturevalue(runtime)
    transformer = on_engines(compiled, tiny_flux())
    base = generate(transformer)
    assert error(base, compiled_anew["base"]) <= EXACT
    add(transformer, "a", 0)
    add(transformer, "b", 1)
    monkeypatch.setattr(Lowering, "lower", lambda *_: pytest.fail("compiled"))
    overlay, engines = compiled.engines.overlay, compiled.variants[0].engines["recompute"]
    for swap in range(100):
        name = "ab"[swap % 2]
        transformer.set_adapters([name], [1.5])
        if swap in (0, 1, 50, 98, 99):
            found = generate(transformer)
            assert error(found, compiled_anew[name]) <= EXACT
            assert error(found, base) >= DIFFERENT
        if swap == 1:
            places = {each: tensor.data_ptr() for each, tensor in overlay.weights.items()}
            before = live_tensors()
    assert live_tensors() == before
    assert {each: tensor.data_ptr() for each, tensor in overlay.weights.items()} == places
    assert set(places) <= set(compiled.weights)
    transformer.unload_lora()
    assert torch.equal(generate(transformer), base)
    assert overlay.weights == {}
    assert compiled.variants[0].engines["recompute"] is engines


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 5},
        {"lora_bias": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 7}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_of_lora(options: dict[str, Any], eager: rc.Compiled) -> None:
    original = tiny_flux()
    transformer = on_engines(eager, original)
    base = generate(transformer)
    add(transformer, "a", 0, **options)
    for layer in original.modules():
        for bias in (each.bias for each in getattr(layer, "lora_B", {}).values() if each.bias is not None):
            bias.copy_(torch.randn_like(bias))
    transformer.set_adapters("a", 0.7)
    found = generate(transformer)
    plain = torch.stack(
        [original(**loop_inputs(step, flux_inputs()), return_dict=False)[0] for step in range(NUM_STEPS)]
    )
    assert error(found, plain) <= EXACT
    assert error(found, base) >= DIFFERENT
    transformer.unload_lora()
    assert torch.equal(generate(transformer), base)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_other_adapters_of_peft(kind: str, eager: rc.Compiled) -> None:
    import peft

    original = tiny_flux()
    transformer = on_engines(eager, original)
    torch.manual_seed(0)
    transformer.add_adapter(getattr(peft, kind)(r=4, init_weights=False, target_modules=["to_q", "proj_mlp"]))
    found = generate(transformer, joint_attention_kwargs={"scale": 0.5})
    plain = torch.stack(
        [
            original(**loop_inputs(step, flux_inputs()), joint_attention_kwargs={"scale": 0.5}, return_dict=False)[0]
            for step in range(NUM_STEPS)
        ]
    )
    assert error(found, plain) <= EXACT
    transformer.unload_lora()


def test_what_was_compiled_with_an_adapter_follows_as_well(tmp_path: Path, compiled_anew: dict[str, Tensor]) -> None:
    original, plain = tiny_flux(), compiled_anew["base"]
    add(original, "a", 0)
    original.set_adapters(["a"], [1.5])
    expected = compiled_anew["a"]
    compiled = compile_flux(original)
    compiled.save(tmp_path / "adapted")
    for each in (compiled, rc.load(tmp_path / "adapted")):
        assert error(generate(on_engines(each, tiny_flux())), expected) <= EXACT  # they have it, the module does not
        transformer = on_engines(each, original)
        assert error(generate(transformer), expected) <= EXACT
        transformer.disable_adapters()
        assert error(generate(transformer), plain) <= EXACT
        transformer.enable_adapters()
        assert error(generate(transformer), expected) <= EXACT
    transformer.unload_lora()
    assert error(generate(transformer), plain) <= EXACT


def test_an_adapter_that_was_fused_for_good_stays(eager: rc.Compiled) -> None:
    original = tiny_flux()
    transformer = on_engines(eager, original)
    base = generate(transformer)
    add(transformer, "a", 0)
    active = generate(transformer)
    transformer.fuse_lora()
    transformer.unload_lora()
    assert error(generate(transformer), active) <= EXACT
    assert torch.equal(generate(on_engines(eager, tiny_flux())), base)  # another module, the same engines
    add(transformer, "b", 1)
    transformer.fuse_lora()
    transformer.unfuse_lora()
    transformer.unload_lora()
    assert error(generate(transformer), active) <= EXACT


def test_new_weights_go_below_adapters() -> None:
    compiled, other = compile_flux(tiny_flux()), tiny_flux(seed=1)
    transformer = on_engines(compiled, tiny_flux())
    add(transformer, "a", 0)
    generate(transformer)
    compiled.refit(other.state_dict())
    add(other, "a", 0)
    assert error(generate(transformer), anew(other)) <= EXACT
    transformer.unload_lora()
    assert error(generate(transformer), anew(tiny_flux(seed=1))) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_what_peft_does_rounded_once(dtype: torch.dtype) -> None:
    original = tiny_flux()
    add(original, "a", 0)
    add(original, "b", 1)
    original.set_adapters(["a", "b"], [0.5, 0.25])
    layer = original.get_submodule("transformer_blocks.0.attn.to_q")
    base = layer.base_layer.weight.detach().to(dtype)
    exact = base.double() + 0.3 * (layer.get_delta_weight("a").double() + layer.get_delta_weight("b").double())
    result = {"weight": torch.empty_like(base)}
    merge(layer, 0.3, {"weight": base}, result)
    bound = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert error(result["weight"].double(), exact) <= bound


def test_a_strength_of_the_call_that_cannot_be_is_an_error(eager: rc.Compiled) -> None:
    transformer = on_engines(eager, tiny_flux())
    weak = {"joint_attention_kwargs": {"scale": 0.5}}
    base = generate(transformer)
    assert torch.equal(generate(transformer, **weak), base)  # as in diffusers: there is no adapter
    with pytest.raises(MismatchError, match=r"joint_attention_kwargs\.scale is 0\.5, compiled without"):
        generate(on_engines(eager), **weak)
    add(transformer, "a", 0)
    with pytest.raises(CaptureError, match="joint_attention_kwargs has the strength 'weak'; expected a number"):
        generate(transformer, joint_attention_kwargs={"scale": "weak"})
    transformer.fuse_lora()
    with pytest.raises(ModelError, match=r"asks for the strength 0\.5, but they are fused; call unfuse_lora\(\) first"):
        generate(transformer, **weak)
    transformer.unfuse_lora()
    assert error(generate(transformer, **weak), base) >= DIFFERENT
    transformer.unload_lora()
    assert torch.equal(generate(transformer), base)


def test_no_module_no_adapters(loras: dict[tuple[str, str], Path]) -> None:
    pipeline = TINY["flux"].make()
    pipeline.transformer = None
    rc.accelerate(pipeline, family("flux").parts)
    with pytest.raises(
        ModelError, match=r"load_lora_weights: the pipeline has no transformer of its own .* load it with"
    ):
        load(pipeline, loras["flux", "a"], "a")


WIDER = {
    "transformer.x_embedder.lora_A.weight": torch.ones(2, 20),
    "transformer.x_embedder.lora_B.weight": torch.ones(24, 2),
}
NORMS = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(12)}
FAILING = {
    "wider": (WIDER, ModelError, r"load_lora_weights: makes x_embedder \[24, 20\], compiled \[24, 16\]"),
    "norms": (WIDER | NORMS, ModelError, r"norm_q\.weight replaces a weight"),
    "norms alone": (NORMS, ModelError, r"norm_q\.weight replaces a weight"),
    "no lora": ({"transformer.x": torch.ones(1)}, ValueError, "Invalid LoRA checkpoint"),
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_fails_changes_nothing(kind: str, loaded: bool, loras: dict[tuple[str, str], Path]) -> None:
    weights, failure, message = FAILING[kind]
    pipeline = family("flux").pipeline()
    original = pipeline.transformer.original
    if loaded:
        load(pipeline, loras["flux", "a"], "a")
    before, parts = draw(pipeline, TINY["flux"].call(0), STEPS), dict(original.named_modules())
    with pytest.raises(failure, match=message):
        pipeline.load_lora_weights(dict(weights), adapter_name="new")
    assert dict(original.named_modules()) == parts
    assert pipeline.get_list_adapters() == ({"transformer": ["a"]} if loaded else {})
    assert torch.equal(draw(pipeline, TINY["flux"].call(0), STEPS), before)


def test_a_failure_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch, eager: rc.Compiled) -> None:
    original = tiny_flux()
    transformer = on_engines(eager, original)
    add(transformer, "a", 0)
    before, state = generate(transformer), {name: each.clone() for name, each in original.state_dict().items()}
    layer = original.get_submodule("single_transformer_blocks.2.attn.to_v")
    whole = LoraLinear.merge
    with monkeypatch.context() as patch:
        patch.setattr(LoraLinear, "merge", lambda self, **options: 1 / 0 if self is layer else whole(self, **options))
        with pytest.raises(ZeroDivisionError):
            transformer.fuse_lora()
    assert torch.equal(generate(transformer), before)
    assert all(torch.equal(each, state[name]) for name, each in original.state_dict().items())
    assert not layer.merged
    with pytest.raises(ModelError, match="replaced by a module of the adapter"):
        add(transformer, "c", 0, modules_to_save=["proj_out"])
    assert list(original.peft_config) == ["a"]
    assert torch.equal(generate(transformer), before)
    transformer.unload_lora()


def test_the_module_may_be_changed_while_it_has_its_place(loras: dict[tuple[str, str], Path]) -> None:
    pipeline, call = family("flux").pipeline(), TINY["flux"].call(0)
    rc.restore(pipeline)
    load(pipeline, loras["flux", "a"], "a")
    expected = draw(pipeline, call, STEPS)
    rc.accelerate(pipeline, family("flux").parts, STEPS)
    assert error(draw(pipeline, call, STEPS), expected) <= EXACT
    pipeline.fuse_lora()
    for other in (pickle.loads(pickle.dumps(pipeline)), copy.deepcopy(pipeline)):
        other.set_progress_bar_config(disable=True)
        assert error(draw(other, call, STEPS), expected) <= EXACT
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert error(draw(pipeline, call, STEPS), draw(TINY["flux"].make(), call, STEPS)) <= EXACT


def test_another_size_falls_back_with_the_adapters(loras: dict[tuple[str, str], Path]) -> None:
    pipeline, plain = family("flux").pipeline(fallback="eager"), TINY["flux"].make()
    call = TINY["flux"].call(0) | {"height": 32, "width": 32, "joint_attention_kwargs": {"scale": 0.5}}
    for each in (pipeline, plain):
        load(each, loras["flux", "a"], "a")
    with pytest.warns(UserWarning, match="running the original transformer"):
        assert torch.equal(draw(pipeline, call, STEPS), draw(plain, call, STEPS))


@pytest.mark.parametrize("fails", [False, True])
def test_generations_go_on_while_an_adapter_is_read(
    fails: bool, loras: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they change on the pipeline stays."""
    pipeline, call = family("flux").pipeline(), TINY["flux"].call(0)
    base, read = draw(pipeline, call, STEPS), type(pipeline).lora_state_dict
    seen: list[Tensor] = []

    def generate_and_read(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(draw, pipeline, call, STEPS).result(120))
        pipeline.note = "kept"
        if fails:
            raise OSError("no network")
        return read(*args, **kwargs)

    monkeypatch.setattr(type(pipeline), "lora_state_dict", staticmethod(generate_and_read), raising=False)
    if fails:
        with pytest.raises(OSError, match="no network"):
            load(pipeline, loras["flux", "a"], "a")
    else:
        load(pipeline, loras["flux", "a"], "a")
    assert torch.equal(seen[0], base)
    assert pipeline.note == "kept"
    assert "lora_state_dict" not in vars(pipeline)
    assert pipeline.get_list_adapters() == ({} if fails else {"transformer": ["a"]})
    changed = error(draw(pipeline, call, STEPS), base)
    assert changed == 0 if fails else changed >= DIFFERENT


def test_methods_that_read_files_are_known() -> None:
    assert [_reads_files(getattr(FluxPipeline, name)) for name in ("load_lora_weights", "fuse_lora")] == [True, False]
    assert not _reads_files(lambda self: self.load_lora_weights())


def test_offloaded_pipelines_load_no_adapters(loras: dict[tuple[str, str], Path]) -> None:
    pipeline = family("flux").pipeline()
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ModelError, match=r"is offloaded; call remove_all_hooks\(\)"):
        load(pipeline, loras["flux", "a"], "a")
    pipeline.remove_all_hooks()
    load(pipeline, loras["flux", "a"], "a")
    assert adapters_of(pipeline.transformer.original) is not None
