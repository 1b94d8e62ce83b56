"""Policies and forecasters that look at the model before they choose."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.config import CompileConfig
from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Calibration, Problem, make_schedules
from recache_compile.policies.gram import Gram
from recache_compile.policies.recache import ReCache, most_likely
from recache_compile.policies.reinforce import new_logits
from recache_compile.policies.uniform import Uniform
from recache_compile.search import default_policy as choosing
from recache_compile.search.default_policy import (
    CALIBRATIONS,
    Choice,
    calibrate_pipeline,
    choose_policy,
    default_policy,
    policy_name,
)
from recache_compile.support.log import told
from tests.conftest import PROMPT

STEPS = 8
OTHER = "a green cross above a cyan diamond on a light background"
OPTIONS = {"budgets": (3, 4), "num_steps": STEPS, "runtime": "eager", "call": {"prompt": PROMPT}}


@pytest.fixture(scope="session")
def reports() -> list[str]:
    """The stages of the compilation below."""
    return []


@pytest.fixture(scope="session")
def fitted(shapes: Any, reports: list[str]) -> Iterator[rc.Compiled]:
    """Chosen by default, with nothing that ships."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "SHIPPED", {})
        with told(reports.append):
            made = rc.compile(shapes, policy="auto", forecaster="fitted", **OPTIONS)
        yield made


@pytest.fixture(scope="session")
def calibration(shapes: Any, fitted: rc.Compiled) -> Calibration:
    """Made again on the engines, which know no schedule."""
    return calibrate_pipeline(shapes, fitted.engines, [{"prompt": PROMPT}] * CALIBRATIONS)


def draw(shapes: Any, compiled: rc.Compiled, budget: int) -> Tensor:
    pipeline = type(shapes)(shapes.transformer, shapes.scheduler, shapes.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": STEPS, "output_type": "pt", "generator": torch.Generator().manual_seed(1)}
    return rc.accelerate(pipeline, compiled, budget)(PROMPT, **arguments).images


def test_gram_is_the_default_and_runs_a_few_full_generations(fitted: rc.Compiled, reports: list[str]) -> None:
    assert (fitted.policy, fitted.forecaster.name) == ("gram", "fitted")
    assert [each for each in reports if "calibrating" in each] == [
        f"calibrating, generation {number} of 4" for number in (1, 2, 3, 4)
    ]
    assert reports[-1] == "choosing schedules"


def test_schedules_are_those_of_the_calibration(fitted: rc.Compiled, calibration: Calibration) -> None:
    problem = Problem(STEPS, fitted.forecaster, calibration)
    assert fitted.schedules == {budget: Gram().schedule(problem, budget) for budget in (3, 4)}
    assert fitted.schedules[3] != Uniform().schedule(problem, 3)
    assert fitted.schedules[3] != Gram().schedule(replace(problem, forecaster=Taylor(order=1)), 3)


def test_coefficients_are_the_least_squares_of_the_calibration(fitted: rc.Compiled, calibration: Calibration) -> None:
    gram = calibration.features.sum(0)
    np.testing.assert_allclose(np.array(fitted.forecaster.gram), gram, rtol=1e-12)
    values, vectors = np.linalg.eigh(gram)
    features = (vectors * np.sqrt(values.clip(0))).T  # columns with the inner products of the features
    plan = fitted.plans[3]
    for step, this in enumerate(plan.steps):
        if this.slot is not None:
            continue
        held = [at for at in plan.schedule.recompute_steps if at < step][-2:]
        best = np.linalg.lstsq(features[:, held], features[:, step], rcond=None)[0]
        by_slot = {plan.steps[at].slot: weight for at, weight in zip(held, best, strict=True)}
        assert this.coefficients == pytest.approx([by_slot[slot] for slot in sorted(by_slot)], abs=0.02)


def test_what_was_calibrated_is_saved(fitted: rc.Compiled, shapes: Any, tmp_path: Path) -> None:
    fitted.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    assert loaded.plans == fitted.plans
    assert loaded.forecaster.gram == fitted.forecaster.gram
    for budget in (3, 4):
        assert torch.equal(draw(shapes, loaded, budget), draw(shapes, fitted, budget))
    late = Schedule((0, 1, 6), STEPS)
    assert (
        loaded.engines.with_plans({3: late}, loaded.forecaster).plans
        == fitted.engines.with_plans({3: late}, fitted.forecaster).plans
    )


def test_calibrating_leaves_the_pipeline_alone(fitted: rc.Compiled, shapes: Any) -> None:
    transformer, settings = shapes.transformer, dict(getattr(shapes, "_progress_bar_config", {}))
    calls = [{"prompt": PROMPT}, {"prompt": OTHER}]
    calibration = calibrate_pipeline(shapes, fitted.engines, calls)
    assert shapes.transformer is transformer
    assert dict(getattr(shapes, "_progress_bar_config", {})) == settings
    assert calibration.predictions.shape == (2, STEPS, STEPS)
    assert not np.allclose(calibration.predictions[0], calibration.predictions[1], rtol=0.01)
    again = calibrate_pipeline(shapes, fitted.engines, calls)
    assert np.array_equal(again.predictions, calibration.predictions)


@pytest.mark.parametrize(
    "choice",
    [
        {"policy": "gram"},
        {"policy": "dp"},
        {"forecaster": "fitted"},
        {"forecaster": "fitted", "policy": {3: (0, 1, 2), 4: (0, 1, 2, 3)}},
    ],
)
def test_a_module_cannot_be_looked_at(choice: dict[str, Any], shapes: Any) -> None:
    message = r"they need a few uncached generations; compile a pipeline without example_inputs, or choose others"
    options = {"budgets": (3, 4), "num_steps": STEPS, **choice}
    for model, inputs in ((shapes.transformer, {}), (shapes.transformer, None), (shapes, {"hidden_states": 0})):
        with pytest.raises(ScheduleError, match=message):
            rc.compile(model, inputs, **options)


def test_a_search_on_the_true_loss_belongs_to_training(shapes: Any) -> None:
    with pytest.raises(ScheduleError, match="policy search: searches on the true loss; use `recache-compile train`"):
        rc.compile(shapes, policy="search", **OPTIONS)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear(sample)


def test_auto_is_uniform_for_a_module() -> None:
    options = {"num_steps": 6, "granularity": "output", "runtime": "eager", "policy": "auto"}
    compiled = rc.compile(Small(), {"sample": torch.ones(1, 4)}, budgets=(3,), **options)
    assert compiled.schedules[3].recompute_steps == (0, 2, 4)
    assert compiled.policy == "uniform"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy that comes with the package for shapes, taylor of order 1."""
    logits = new_logits(Problem(STEPS, seed=3), width=0)
    logits.bias.copy_(torch.linspace(-1, 1, STEPS - 1))  # the last steps come first
    ReCache(logits, {"granularity": "stack", "schedules": {str(k): [] for k in range(2, STEPS)}}).save(
        tmp_path / "policies" / "taylor-1"
    )
    monkeypatch.setattr(choosing, "SHIPPED", {"ShapesPipeline": tmp_path / "policies"})
    return tmp_path / "policies" / "taylor-1"


@pytest.mark.parametrize(
    ("changes", "ships"),
    [
        ({}, True),
        ({"pipeline": "FluxPipeline"}, False),
        ({"forecaster": "hicache"}, False),
        ({"order": 2}, False),
        ({"num_steps": STEPS + 1}, False),
        ({"granularity": "block"}, False),
        ({"budgets": (3, STEPS)}, False),
    ],
)
def test_a_shipped_policy_serves_what_it_was_trained_for(changes: dict[str, Any], ships: bool, shipped: Path) -> None:
    facts = {
        "pipeline": "ShapesPipeline",
        "forecaster": "taylor",
        "order": 1,
        "num_steps": STEPS,
        "granularity": "stack",
        "budgets": (2, 3),
    }
    asked = facts | changes
    config = CompileConfig(num_steps=asked.pop("num_steps"), granularity=asked.pop("granularity"))
    assert default_policy(**asked, config=config) == (str(shipped) if ships else "gram")


def test_nothing_ships_for_a_pipeline_whose_name_is_a_folder_here(
    tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shipped.parent)
    assert default_policy("FluxPipeline", "taylor", 1, CompileConfig(num_steps=STEPS), (3,)) == "gram"


def test_auto_takes_the_policy_that_ships(shipped: Path, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a generation of the model."""

    class EnoughError(Exception):
        pass

    seen: list[Any] = []

    def stop(choice: Choice, calibration: Any = None) -> Any:
        seen.append((make_schedules(choice.policy, choice.budgets, Problem(STEPS, Taylor(1))), choice.name))
        raise EnoughError

    monkeypatch.setattr(Choice, "answer", stop)
    for policy in ("auto", str(shipped)):
        with pytest.raises(EnoughError):
            rc.compile(shapes, policy=policy, **OPTIONS)
    schedules = {3: Schedule((0, 6, 7), STEPS), 4: Schedule((0, 5, 6, 7), STEPS)}
    assert seen == [(schedules, "trained taylor-1")] * 2
    with pytest.raises(EnoughError):
        rc.compile(shapes, {"hidden_states": torch.zeros(1)}, budgets=(3,), num_steps=STEPS, runtime="eager")
    assert seen[2] == ({3: Schedule((0, 2, 5), STEPS)}, "uniform")


def test_policies_have_names() -> None:
    assert policy_name("gram") == "gram"
    assert policy_name("my/policy") == "my/policy"
    assert policy_name({3: (0, 1, 2)}) == policy_name(Gram()) == "given"


@pytest.mark.parametrize(
    ("policy", "forecaster", "needs"),
    [
        ("uniform", "taylor", False),
        ("uniform", "fitted", True),
        ("gram", "taylor", True),
        ("teacache", "reuse", True),
        ({2: (0, 1)}, "taylor", False),
        (Gram(starts=2), "taylor", True),
    ],
)
def test_who_needs_to_look_at_the_model(policy: Any, forecaster: str, needs: bool) -> None:
    choice = choose_policy(policy, (2,), forecaster, 1, CompileConfig(num_steps=STEPS), "SomePipeline")
    assert choice.needs_calibration == needs


def test_shipped_policies_can_be_read() -> None:
    for folder in choosing.SHIPPED.values():
        for each in folder.glob("*-*"):
            policy = choosing.read_policy(each)
            assert most_likely(policy.logits, 5).budget == 5
            assert policy.facts["granularity"] == "stack"


def test_a_calibration_needs_no_pictures(fitted: rc.Compiled, shapes: Any) -> None:
    found = calibrate_pipeline(shapes, fitted.engines, [{"prompt": PROMPT, "output_type": "np"}])
    assert found.predictions.shape == (1, STEPS, STEPS)
