"""Recording how a pipeline calls its transformer."""

import functools
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.compiler.examples import distinct
from recache_compile.errors import ModelError, RecacheError
from recache_compile.ir.value import Kind
from recache_compile.pipelines.call_recorder import CallRecorder
from recache_compile.pipelines.record import denoisers_of, record_examples
from tests.conftest import PROMPT
from tests.families import BUDGET, EXACT, TINY, compile_tiny, error, plain
from tests.tiny_pipelines import FLOW_HEUN, TinyPipeline, draw

STEPS = 8


def test_a_recording_knows_shapes_and_timesteps(shapes: Any) -> None:
    (example,) = record_examples(shapes, STEPS, {"prompt": PROMPT, "guidance_scale": 3.0})
    assert example.inputs["hidden_states"].shape == (1, 64, 48)
    assert torch.allclose(example.timesteps["timestep"][:, 0] * 1000, shapes.scheduler.timesteps)
    assert "forward" not in vars(shapes.transformer)


def test_a_recording_that_fails_restores_the_transformer(shapes: Any) -> None:
    with pytest.raises(RecacheError, match=r"unknown \['elephant', 'purple'\]"):
        record_examples(shapes, STEPS, {"prompt": "a purple elephant"})
    with pytest.raises(ModelError, match=r"recording a call .* failed"):
        record_examples(shapes, STEPS, {"prompt": PROMPT, "height": "tall"})
    assert "forward" not in vars(shapes.transformer)


def test_a_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(ModelError, match="no transformer to compile"):
        rc.compile(object())


def test_a_step_may_have_several_calls() -> None:
    tiny = TINY["wan-2.1"]
    pipeline = tiny.make()
    (example,) = record_examples(pipeline, STEPS, tiny.call(0))
    assert torch.equal(example.timesteps["timestep"][:, 0], pipeline.scheduler.timesteps)


def test_a_part_of_the_loop_has_no_timetable() -> None:
    tiny = TINY["wan-2.2"]
    pipeline = tiny.make()
    pipeline.scheduler.set_timesteps(STEPS)
    assert int((pipeline.scheduler.timesteps >= 875).sum()) == STEPS // 2  # so each transformer is called STEPS times
    for component in denoisers_of(pipeline):
        (example,) = record_examples(pipeline, STEPS, tiny.call(0), component)
        assert example.timesteps == {}


def test_every_kind_of_call_is_an_example() -> None:
    tiny = TINY["sd3"]
    call = tiny.call(0) | {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}
    both, skipping = record_examples(tiny.make(), STEPS, call)
    assert both.inputs["hidden_states"].shape[0] == 2
    assert len(both.timesteps["timestep"]) == STEPS
    assert skipping.inputs["hidden_states"].shape[0] == 1
    assert skipping.inputs["skip_layers"] == [1]
    assert skipping.timesteps == {}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, control: Tensor, prompt: Tensor, **when: Tensor) -> tuple[Tensor]:
        return (self.scale * hidden_states,)


class Loop:
    """A pipeline with two calls in each step, from `start` on; `clock` is its name for the timestep."""

    def __init__(self, clock: str, start: int = 0) -> None:
        self.transformer, self.clock, self.start = Denoiser(), clock, start
        self.components = {"transformer": self.transformer}

    def set_progress_bar_config(self, **config: Any) -> None:
        pass

    def __call__(self, num_inference_steps: int) -> None:
        for step in range(self.start, num_inference_steps):
            for branch in (0.0, 1.0):
                self.transformer(
                    hidden_states=torch.zeros(1, 4),
                    control=torch.full((1, 4), float(step)),
                    prompt=torch.full((1, 2), branch),
                    **{self.clock: torch.tensor([float(step)])},
                )


@pytest.mark.parametrize("clock", ["timestep", "progress"])
def test_inputs_that_change_from_step_to_step_get_a_role(clock: str) -> None:
    (example,) = record_examples(Loop(clock), STEPS, {})
    own_name = {} if clock == "timestep" else {clock: Kind.TIMESTEP}
    assert example.roles == {"control": Kind.LATENTS, **own_name}
    assert torch.equal(example.timesteps[clock], torch.arange(float(STEPS))[:, None])


@pytest.mark.parametrize("start", range(1, STEPS))
def test_inputs_get_a_role_in_a_part_of_the_loop(start: int) -> None:
    (example,) = record_examples(Loop("timestep", start), STEPS, {})
    assert example.timesteps == {}
    assert example.roles == ({} if start == STEPS - 1 else {"control": Kind.LATENTS})


def test_a_transformer_without_weights_is_refused() -> None:
    pipeline = SimpleNamespace(transformer=nn.Identity())
    with pytest.raises(ModelError, match="its transformer has no weights"):
        record_examples(pipeline, STEPS, {})


def test_a_forward_that_someone_else_has_replaced_is_put_back() -> None:
    pipeline = Loop("timestep")
    hooked = functools.partial(Denoiser.forward, pipeline.transformer)
    pipeline.transformer.forward = hooked  # type: ignore[method-assign]
    record_examples(pipeline, STEPS, {})
    assert vars(pipeline.transformer)["forward"] is hooked


def test_the_generators_of_a_call_and_the_global_one_do_not_move() -> None:
    tiny = TINY["flux"]
    generator = torch.Generator().manual_seed(5)
    before, everywhere = generator.get_state(), torch.get_rng_state()
    call = tiny.call(0) | {"generator": generator}
    record_examples(tiny.make(), STEPS, call)
    compile_tiny(tiny, call)
    compile_tiny(tiny, call, policy="gram")
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


def sana_sprint() -> Any:
    """A pipeline whose scheduler has one timestep more than the loop has steps."""
    sana = TINY["sana"].make()
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(**dict(sana.transformer.config) | {"guidance_embeds": True}).eval()
    pipeline = diffusers.SanaSprintPipeline(None, None, sana.vae, transformer, diffusers.SCMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sana_sprint_call(n: int) -> dict[str, Any]:
    call = TINY["sana"].call(n)
    kept = ("height", "width", "use_resolution_binning", "prompt_embeds", "prompt_attention_mask")
    return {name: call[name] for name in kept} | {"intermediate_timesteps": None}


def test_a_spare_timestep_at_the_end_is_no_step() -> None:
    tiny = TinyPipeline("sana-sprint", sana_sprint, sana_sprint_call, None)
    call = tiny.call(0)
    expected = plain(tiny, call)
    compiled = compile_tiny(tiny, call)
    pipeline = rc.accelerate(tiny.make(), compiled, budget=STEPS)
    assert len(pipeline.scheduler.timesteps) != STEPS + 1
    assert error(draw(pipeline, call, STEPS), expected) <= EXACT
    assert len(pipeline.scheduler.timesteps) == STEPS + 1
    assert torch.isfinite(draw(pipeline, call, STEPS, budget=BUDGET)).all()
    one_more = plain(tiny, call, num_steps=STEPS + 1)
    assert error(draw(pipeline, call, STEPS + 1, budget=1.0), one_more) <= EXACT


def test_a_scheduler_that_makes_more_steps_than_it_is_asked_for_is_refused_early() -> None:
    tiny = TINY["sd3"]
    pipeline = tiny.make()
    pipeline.scheduler = FLOW_HEUN(pipeline.scheduler.config)
    remedy = r"compile with num_steps=15 and call=\{'num_inference_steps': 8\}, or use another scheduler"
    with pytest.raises(ModelError, match=f"the pipeline runs 15 steps, but 8 were compiled: .*{remedy}"):
        record_examples(pipeline, STEPS, tiny.call(0))


def test_calls_under_attention_processors_of_their_own_are_a_kind_of_their_own() -> None:
    class Perturbed(JointAttnProcessor2_0):  # type: ignore[misc]
        pass

    pipeline, call = TINY["sd3"].make(), TINY["sd3"].call(0)
    encode, at_rest = pipeline.encode_prompt, pipeline.transformer.attn_processors
    (plain_example,) = record_examples(pipeline, 4, call)

    def perturbing(*args: Any, **kwargs: Any) -> Any:
        pipeline.transformer.transformer_blocks[1].attn.processor = Perturbed()
        return encode(*args, **kwargs)

    pipeline.encode_prompt = perturbing
    (example,) = record_examples(pipeline, 4, call)
    pipeline.transformer.set_attn_processor(at_rest)
    assert plain_example.attention == ""
    assert not plain_example.processors
    assert example.attention.startswith("transformer_blocks.1.attn: ")
    assert example.attention.endswith("Perturbed()")
    assert len(distinct([plain_example, example])) == 2


def test_containers_are_recorded_as_they_were_given() -> None:
    class Emptying(Denoiser):
        def forward(  # type: ignore[override]
            self, sample: Tensor, timestep: Tensor, residuals: list[Tensor]
        ) -> Tensor:
            return sample + residuals.pop()

    recorder = CallRecorder(module := Emptying(), module.forward, {})
    residuals = [torch.ones(2), torch.zeros(2)]
    recorder(torch.ones(2), torch.ones(1), residuals)
    assert len(residuals) == len(recorder.calls[0]["residuals"]) == 2
    residuals.clear()
    assert len(recorder.calls[0]["residuals"]) == 2
