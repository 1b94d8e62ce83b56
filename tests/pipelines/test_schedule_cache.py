"""`accelerate` without a compilation: programs and schedules are made once, and afterwards found on the disk."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import recache_compile as rc
from recache_compile import api
from recache_compile.compiler import captures
from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.program import Program
from recache_compile.runtimes.inductor import Inductor
from recache_compile.runtimes.onnxruntime import OnnxRuntime
from tests.families import BUDGET, EXACT, SAME, STEPS, TINY, error, plain
from tests.tiny_pipelines import draw

FLUX = TINY["flux"]
CALL = FLUX.call(0)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model is split, and how often a policy is asked, with a cache that is empty at first."""
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    seen: Counter[str] = Counter()
    specialise, plan_pipeline = captures.specialise, api.plan_pipeline

    def splitting(*args: Any) -> dict[str, Program]:
        seen["split"] += 1
        return specialise(*args)

    def planning(*args: Any) -> rc.Compiled:
        seen["planned"] += 1
        return plan_pipeline(*args)

    monkeypatch.setattr(captures, "specialise", splitting)
    monkeypatch.setattr(api, "plan_pipeline", planning)
    return seen


def accelerated(pipeline: Any, budget: int = BUDGET, call: Any = CALL) -> Any:
    return rc.accelerate(pipeline, budget=budget, num_steps=STEPS, call=call, runtime="eager")


def test_programs_and_schedules_are_found_the_second_time(made: Counter[str]) -> None:
    first, second = accelerated(FLUX.make()), accelerated(FLUX.make())
    assert made == {"split": 1, "planned": 1}
    ours, theirs = first.transformer.compiled, second.transformer.compiled
    assert list(ours.schedules) == [BUDGET]
    assert ours.schedules == theirs.schedules
    assert ours.policy == theirs.policy == "gram"
    assert error(draw(second, CALL, STEPS), draw(first, CALL, STEPS)) <= SAME


def test_every_budget_has_the_same_engines(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    full = accelerated(FLUX.make(), STEPS)
    assert made == {"split": 1, "planned": 2}
    assert error(draw(full, CALL, STEPS), plain(FLUX, CALL)) <= EXACT


def test_another_value_of_a_weight_has_the_same_programs_and_other_schedules(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    other = FLUX.make()
    other.transformer.proj_out.weight[0, 0] += 1
    expected = draw(other, CALL, STEPS)
    accelerated(other, STEPS)
    assert made == {"split": 1, "planned": 2}
    assert error(draw(other, CALL, STEPS), expected) <= EXACT


def test_another_size_is_another_call(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    accelerated(FLUX.make(), call=CALL | {"height": 32})
    assert made == {"split": 2, "planned": 2}


def test_a_cache_that_cannot_be_written_to_is_done_without(
    made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "file"))
    assert torch.isfinite(draw(accelerated(FLUX.make()), CALL, STEPS)).all()
    assert made == {"split": 1, "planned": 1}


def test_an_accelerated_pipeline_from_the_cache_can_be_pickled(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    pipeline = accelerated(FLUX.make())
    again = pickle.loads(pickle.dumps(pipeline))  # our own
    assert again.transformer.compiled.schedules == pipeline.transformer.compiled.schedules
    assert again.transformer.compiled.policy == pipeline.transformer.compiled.policy
    assert error(draw(again, CALL, STEPS), draw(pipeline, CALL, STEPS)) <= SAME


def test_an_accelerated_pipeline_is_accelerated_anew(made: Counter[str]) -> None:
    pipeline = accelerated(FLUX.make())
    original = pipeline.transformer.original
    assert accelerated(pipeline, STEPS).transformer.original is original
    assert made["split"] == 1
    assert error(draw(pipeline, CALL, STEPS), plain(FLUX, CALL)) <= EXACT


def test_another_strength_of_an_adapter_has_other_schedules(made: Counter[str]) -> None:
    pipeline = FLUX.make()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for number, strength in enumerate((1.0, 0.25, 1.0)):
        pipeline.transformer.set_adapters(["default"], [strength])
        accelerated(pipeline)
        rc.restore(pipeline)
        assert made == {"split": 1, "planned": min(number + 1, 2)}


def test_schedules_that_were_done_without_are_not_kept(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*args: Any) -> rc.Compiled:
        made["planned"] += 1
        return args[0].with_plans({BUDGET: rc.Schedule((0, 1, 2), STEPS)}, Taylor(1), "uniform")

    monkeypatch.setattr(api, "plan_pipeline", refusing)
    for _ in range(2):
        assert accelerated(FLUX.make()).transformer.compiled.policy == "uniform"
    assert made["planned"] == 2


def test_a_cache_that_others_may_write_to_is_not_read(made: Counter[str], tmp_path: Path) -> None:
    accelerated(FLUX.make())
    (tmp_path / "cache").chmod(0o777)
    accelerated(FLUX.make())
    assert made == {"split": 2, "planned": 2}


def test_what_is_compiled_takes_no_choices_of_a_compilation(made: Counter[str]) -> None:
    compiled = accelerated(FLUX.make()).transformer.compiled
    with pytest.raises(ModelError, match="accelerate: num_steps, runtime: what is compiled already has its own"):
        rc.accelerate(FLUX.make(), compiled, num_steps=STEPS, runtime="eager")


def test_a_runtime_that_is_passed_over_is_told_at_the_caller_s_line(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Any, building: bool) -> None:
        raise RuntimeUnavailableError(f"runtime {self.name}: is not here")

    for kind in (Inductor, OnnxRuntime):
        monkeypatch.setattr(kind, "require", missing)
    with pytest.warns(UserWarning, match="runtime inductor: is not here; using runtime eager") as told:
        rc.accelerate(FLUX.make(), budget=BUDGET, num_steps=STEPS, call=CALL)
    with pytest.warns(UserWarning, match="runtime inductor: is not here; using runtime eager") as also:
        rc.compile(FLUX.make(), budgets=(BUDGET,), num_steps=STEPS, call=CALL, policy="uniform")
    assert {told[0].filename, also[0].filename} == {__file__}
