"""An accelerated pipeline is restored, pickled, copied and saved; what it gives out, and what it refuses."""

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import CaptureError, MismatchError, ModelError
from recache_compile.pipelines.transformer import CompiledTransformer
from tests.families import BUDGET, EXACT, SAME, STEPS, TINY, error, family, plain
from tests.tiny_pipelines import TinyPipeline, draw
from tests.zoo.images_a_to_l import HUNYUAN_DIT

FLUX = TINY["flux"]
CALL = FLUX.call(0)


@pytest.fixture(scope="module")
def full() -> Tensor:
    """What the plain pipeline gives."""
    with torch.no_grad():
        return plain(FLUX, CALL)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """What the engines give with the small budget."""
    with torch.no_grad():
        return draw(family("flux").pipeline(BUDGET), CALL, STEPS)


def test_restoring_gives_the_pipeline_its_own_transformer_back(full: Tensor) -> None:
    pipeline = FLUX.make()
    original = pipeline.transformer
    assert rc.restore(rc.accelerate(pipeline, family("flux").parts, budget=BUDGET)) is pipeline
    assert pipeline.transformer is original
    assert type(pipeline) is diffusers.FluxPipeline
    assert torch.equal(draw(pipeline, CALL, STEPS), full)
    with pytest.raises(ModelError, match="FluxPipeline: runs on no engines; there is nothing to restore"):
        rc.restore(pipeline)


def test_without_a_transformer_of_its_own_there_is_nothing_to_restore(small: Tensor) -> None:
    pipeline = FLUX.make()
    pipeline.transformer = None
    rc.accelerate(pipeline, family("flux").parts, budget=BUDGET)
    with pytest.raises(ModelError, match="FluxPipeline: had no transformer of its own that could be given back"):
        rc.restore(pipeline)
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME


def test_a_pickled_pipeline_brings_its_engines(full: Tensor, small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    draw(pipeline, FLUX.call(1), STEPS)
    other = pickle.loads(pickle.dumps(pipeline))
    assert other.transformer.budget == BUDGET
    assert error(draw(other, CALL, STEPS), small) <= SAME
    assert error(draw(other, CALL, STEPS, budget=STEPS), full) <= EXACT
    assert torch.equal(draw(rc.restore(other), CALL, STEPS), full)


def test_a_pickled_pipeline_finds_the_folder_of_its_artifact(tmp_path: Path, small: Tensor) -> None:
    family("flux").parts["transformer"].save(tmp_path / "flux")
    pipeline = FLUX.make()
    pipeline.transformer = None
    rc.accelerate(pipeline, rc.load(tmp_path / "flux"), budget=BUDGET)
    content = pickle.dumps(pipeline)
    weights = sum(weight.nbytes for weight in pipeline.transformer.compiled.weights.values())
    assert len(content) < len(pickle.dumps(FLUX.make())) - weights / 2
    assert error(draw(pickle.loads(content), CALL, STEPS), small) <= SAME


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_accelerated_too(copied: Any, small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    other = copied(pipeline)
    assert type(other) is type(pipeline)
    assert other.transformer.compiled is pipeline.transformer.compiled
    assert error(draw(other, CALL, STEPS), small) <= SAME
    rc.restore(other)
    assert isinstance(pipeline.transformer, CompiledTransformer)
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME


def test_saving_writes_the_pipeline_s_own_transformer(tmp_path: Path, full: Tensor, small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    pipeline.save_pretrained(tmp_path / "flux")
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME
    absent = {name: None for name, component in pipeline.components.items() if component is None}
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "flux", **absent)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer, diffusers.FluxTransformer2DModel)
    assert torch.equal(draw(again, CALL, STEPS), full)


def test_saving_without_weights_says_what_can_be_saved(tmp_path: Path) -> None:
    pipeline = FLUX.make()
    pipeline.transformer = None
    rc.accelerate(pipeline, family("flux").parts)
    with pytest.raises(ModelError, match=r"has no weights of its own transformer to save; .* compiled.save\(FOLDER\)"):
        pipeline.save_pretrained(tmp_path / "flux")
    assert not (tmp_path / "flux").exists()


@pytest.mark.parametrize("name", ["load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale"])
def test_what_engines_do_not_follow_is_refused_until_the_pipeline_is_restored(name: str) -> None:
    pipeline = family("flux").pipeline()
    with pytest.raises(ModelError, match=rf"{name}: the engines hold what was there .* rc.restore\(pipeline\)"):
        getattr(pipeline, name)("adapter")
    rc.restore(pipeline)
    assert getattr(type(pipeline), name) is getattr(diffusers.FluxPipeline, name)


def test_refitting_works_in_every_mode() -> None:
    this = family("flux").parts["transformer"]
    compiled = pickle.loads(pickle.dumps(this))
    other = FLUX.make()
    for parameter in other.transformer.parameters():
        parameter.data *= 1.1
    expected = draw(other, CALL, STEPS)
    with torch.inference_mode():
        state = {name: 1.0 * weight for name, weight in other.transformer.state_dict().items()}
        compiled.refit(state)
    pipeline = rc.accelerate(FLUX.make(), compiled, STEPS)
    assert error(draw(pipeline, CALL, STEPS), expected) <= EXACT
    with torch.inference_mode():
        assert error(draw(pipeline, CALL, STEPS), expected) <= EXACT
    compiled.refit(FLUX.make().transformer.state_dict())
    assert error(draw(pipeline, CALL, STEPS), plain(FLUX, CALL)) <= EXACT


def hunyuan_dit() -> Any:
    """A pipeline that reads `inner_dim` and `num_heads` of its transformer, which are not in the configuration."""
    config = {"use_style_cond_and_image_meta_size": False, "text_len": 4, "text_len_t5": 5, "pooled_projection_dim": 16}
    torch.manual_seed(0)
    vae = TINY["pixart-sigma"].make().vae
    transformer = diffusers.HunyuanDiT2DModel(**{**HUNYUAN_DIT.config, **config}).eval()
    pipeline = diffusers.HunyuanDiTPipeline(
        vae, None, None, transformer, diffusers.DDPMScheduler(beta_end=0.002), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hunyuan_dit_call(n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    call: dict[str, Any] = {"height": 16, "width": 16, "use_resolution_binning": False}
    for prefix in ("", "negative_"):
        for suffix, tokens, width in (("", 4, 24), ("_2", 5, 16)):
            call[f"{prefix}prompt_embeds{suffix}"] = torch.randn(1, tokens, width, generator=generator)
            call[f"{prefix}prompt_attention_mask{suffix}"] = torch.ones(1, tokens).long()
    return call


HUNYUAN = TinyPipeline("hunyuan-dit", hunyuan_dit, hunyuan_dit_call, None)


@pytest.mark.parametrize("weights", [True, False])
def test_the_transformer_gives_out_what_pipelines_read(weights: bool, tmp_path: Path) -> None:
    call, original = HUNYUAN.call(0), hunyuan_dit().transformer
    compiled = rc.compile(
        hunyuan_dit(), call=call, budgets=(STEPS,), num_steps=STEPS, runtime="eager", policy="uniform"
    )
    pipeline = hunyuan_dit()
    if not weights:
        compiled.save(tmp_path / "artifact")
        compiled = rc.load(tmp_path / "artifact")
        pipeline.transformer = None
    rc.accelerate(pipeline, compiled)
    assert (pipeline.transformer.inner_dim, pipeline.transformer.num_heads) == (original.inner_dim, original.num_heads)
    assert error(draw(pipeline, call, STEPS), plain(HUNYUAN, call)) <= EXACT
    with pytest.raises(AttributeError, match=r"has no method fuse_qkv_projections\(\).*rc.restore\(pipeline\)"):
        pipeline.transformer.fuse_qkv_projections()


class Delegating(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that lets another one draw."""

    def __init__(self, transformer: Any, scheduler: Any, vae: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
        self.drawing = diffusers.FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **parts)
        self.drawing.set_progress_bar_config(disable=True)

    def __call__(self, **arguments: Any) -> Any:
        return self.drawing(**arguments)


def test_a_pipeline_that_is_made_of_others_runs_on_engines_inside(full: Tensor, small: Tensor) -> None:
    plain_flux, this = FLUX.make(), family("flux")
    pipeline = Delegating(plain_flux.transformer, plain_flux.scheduler, plain_flux.vae)
    rc.accelerate(pipeline, this.parts, budget=STEPS)
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT
    this.recomputed()
    assert error(draw(pipeline, CALL, STEPS, budget=BUDGET), small) <= SAME
    assert this.recomputed() == {"transformer": BUDGET}
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT
    pipeline.transformer.budget = BUDGET
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME
    rc.restore(pipeline.drawing)
    with pytest.raises(ModelError, match="budget 3: Delegating has its own transformer again"):
        draw(pipeline, CALL, STEPS, budget=BUDGET)
    rc.accelerate(pipeline, this.parts)
    rc.restore(pipeline)
    assert type(pipeline.drawing) is diffusers.FluxPipeline
    assert pipeline.drawing.transformer is plain_flux.transformer
    assert torch.equal(draw(pipeline, CALL, STEPS), full)


def test_an_inner_pipeline_with_another_transformer_keeps_it() -> None:
    flux, other = FLUX.make(), FLUX.make()
    pipeline = Delegating(flux.transformer, flux.scheduler, flux.vae)
    pipeline.drawing.transformer = other.transformer
    rc.accelerate(pipeline, family("flux").parts, budget=STEPS)
    assert pipeline.drawing.transformer is other.transformer
    rc.accelerate(pipeline.drawing, family("flux").parts, budget=STEPS)
    rc.restore(pipeline)
    assert isinstance(pipeline.drawing.transformer, CompiledTransformer)


class Scaled(FluxAttnProcessor):  # type: ignore[misc]
    """Attention whose result is scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        return tuple(self.scale * each for each in result) if isinstance(result, tuple) else self.scale * result


class Scaling(diffusers.FluxPipeline):  # type: ignore[misc]
    """A pipeline whose calls may have attention processors of their own."""

    def __call__(self, *args: Any, scale: float | None = None, **kwargs: Any) -> Any:
        if scale is None:
            return super().__call__(*args, **kwargs)
        before = self.transformer.attn_processors
        self.transformer.set_attn_processor(dict.fromkeys(before, Scaled(scale)))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.transformer.set_attn_processor(before)


@pytest.fixture(scope="module")
def scaling() -> tuple[Any, Any]:
    """A pipeline compiled with and without processors of its own, and a function that makes it anew."""

    def make() -> Any:
        pipeline = FLUX.make()
        pipeline.__class__ = Scaling
        return pipeline

    return make, rc.compile(
        make(), call=[CALL, CALL | {"scale": 0.5}], budgets=(BUDGET, STEPS), num_steps=STEPS, runtime="eager",
        policy="uniform",
    )  # fmt: skip


@torch.no_grad()
def test_calls_under_other_attention_processors_run_on_engines_of_their_own(scaling: tuple[Any, Any]) -> None:
    make, compiled = scaling
    pipeline = rc.accelerate(make(), compiled, budget=STEPS)
    for scale in (None, 0.5, None):
        assert error(draw(pipeline, CALL, STEPS, scale=scale), draw(make(), CALL, STEPS, scale=scale)) <= EXACT
    with pytest.raises(MismatchError, match=r"attn_processors is .*scale=0\.9"):
        draw(pipeline, CALL, STEPS, scale=0.9)
    with pytest.raises(MismatchError, match="attn_processors"):
        pipeline.transformer.set_attn_processor(Scaled(0.7))
        draw(copy.deepcopy(pipeline), CALL, STEPS)
    assert type(pipeline.transformer.original.attn_processors["transformer_blocks.0.attn.processor"]) is not Scaled
    plain_scaled = draw(make(), CALL, STEPS, scale=0.9)
    eager = rc.accelerate(make(), compiled, budget=STEPS, fallback="eager")
    with pytest.warns(UserWarning, match="running the original transformer"):
        assert error(draw(eager, CALL, STEPS, scale=0.9), plain_scaled) <= EXACT


@torch.no_grad()
def test_a_generation_inside_another_has_attention_processors_of_its_own(scaling: tuple[Any, Any]) -> None:
    make, compiled = scaling
    pipeline, inner = rc.accelerate(make(), compiled, budget=STEPS), []
    other = copy.copy(pipeline)
    other.scheduler = copy.deepcopy(pipeline.scheduler)

    def callback(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inner.append(draw(other, CALL, STEPS))
        return values

    outer = draw(pipeline, CALL, STEPS, scale=0.5, callback_on_step_end=callback)
    assert error(inner[0], draw(make(), CALL, STEPS)) <= EXACT
    assert error(outer, draw(make(), CALL, STEPS, scale=0.5)) <= EXACT


def test_attention_processors_that_hold_more_than_numbers_are_refused(scaling: tuple[Any, Any]) -> None:
    make, compiled = scaling
    processor = Scaled(0.5)
    processor.weight = torch.ones(3)
    with pytest.raises(CaptureError, match="attention processor Scaled: its weight is neither a number nor text"):
        rc.accelerate(make(), compiled).transformer.set_attn_processor(processor)
