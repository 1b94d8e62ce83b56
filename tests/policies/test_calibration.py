"""Statistics of uncached generations against direct computation, and step sizes against the schedulers' own steps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

import recache_compile.policies.calibration as subject
from recache_compile.errors import ArtifactError, DispatchError
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import (
    calibrate,
    load_calibration,
    merge_calibrations,
    save_calibration,
    step_sizes,
)

STEPS, SAMPLES, TOKENS, WIDTH = 5, 2, 3, 4
SIZES = [-0.3, -0.25, -0.2, -0.15, -0.1]


@dataclass(frozen=True)
class Generation:
    """Values of a generation over the steps, by guidance branch, and by branch and cache site."""

    results: dict[str, list[Tensor]]
    features: dict[tuple[str, int], list[Tensor]]

    def calibrate(self, samples: int = SAMPLES) -> Calibration:
        return calibrate(list(self.results.values()), list(self.features.values()), samples, SIZES)


def generation(branches: tuple[str, ...] = ("",), sites: tuple[int, ...] = (0,), copies: int = 1) -> Generation:
    """A random generation; `copies` guidance branches are batched."""
    generator = torch.Generator().manual_seed(len(branches) + len(sites))

    def values() -> list[Tensor]:
        return [torch.randn(copies * SAMPLES, TOKENS, WIDTH, generator=generator) + 1 for _ in range(STEPS)]

    return Generation(
        {branch: values() for branch in branches}, {(branch, site): values() for branch in branches for site in sites}
    )


def inner_products(rows: list[list[Tensor]]) -> np.ndarray:
    """(samples, T, T) from the values of every step and sample, one number after another."""
    return np.array(
        [
            [[float((before[sample].double() * after[sample].double()).sum()) for after in rows] for before in rows]
            for sample in range(len(rows[0]))
        ]
    )


def test_grams_are_inner_products_of_each_samples_values() -> None:
    made = generation()
    found = made.calibrate()
    assert found.predictions == pytest.approx(inner_products([list(each) for each in made.results[""]]))
    assert found.features == pytest.approx(inner_products([list(each) for each in made.features["", 0]]))
    assert found.num_steps == STEPS
    assert found.step_sizes.tolist() == SIZES
    assert {getattr(found, each.name).dtype for each in fields(found)} == {np.dtype("float64")}


def test_branches_and_sites_add_up() -> None:
    made = generation(("cond", "uncond"), (0, 1))
    found = made.calibrate()
    predictions, features = np.zeros((2, SAMPLES, STEPS, STEPS))
    for branch in ("cond", "uncond"):
        predictions += inner_products([list(each) for each in made.results[branch]])
        for site in (0, 1):
            features += inner_products([list(each) for each in made.features[branch, site]])
    assert found.predictions == pytest.approx(predictions)
    assert found.features == pytest.approx(features)


def test_branches_in_one_batch_are_a_samples_own_coordinates() -> None:
    made = generation(copies=2)
    found = made.calibrate()
    of_samples = [
        [torch.cat([value[sample], value[SAMPLES + sample]]) for sample in range(SAMPLES)] for value in made.results[""]
    ]
    assert found.predictions == pytest.approx(inner_products(of_samples))


def test_changes_and_ratios_of_the_features() -> None:
    made = generation()
    found = made.calibrate()
    values = [each.double().numpy() for each in made.features["", 0]]
    changes, ratios = [0.0], [1.0]
    for past, now in pairwise(values):
        changes.append(np.abs(now - past).sum() / np.abs(past).sum())
        of_tokens = [
            np.sqrt((now[sample, token] ** 2).sum() / (past[sample, token] ** 2).sum())
            for sample in range(SAMPLES)
            for token in range(TOKENS)
        ]
        ratios.append(np.mean(of_tokens))
    assert found.changes == pytest.approx(changes, rel=1e-5)
    assert found.ratios == pytest.approx(ratios, rel=1e-5)


def test_features_that_are_scaled_have_that_ratio_and_change() -> None:
    made = generation()
    base = made.features["", 0][0]
    scaled = Generation(made.results, {("", 0): [base * 0.9**step for step in range(STEPS)]})
    found = scaled.calibrate()
    assert found.ratios == pytest.approx([1, *[0.9] * 4], rel=1e-5)
    assert found.changes == pytest.approx([0, *[0.1] * 4], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_values_are_represented_by_some_coordinates(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MAX_COORDINATES", 2_000)
    torch.manual_seed(0)
    walk = list(torch.randn(STEPS, SAMPLES, 10_000).cumsum(0).to(dtype))
    found = calibrate([walk], [walk], SAMPLES, SIZES)
    exact = inner_products([list(value) for value in walk])
    assert found.predictions == pytest.approx(exact, rel=0.15, abs=1500)
    assert np.linalg.eigvalsh(found.predictions).min() > 0
    again = calibrate([walk], [walk], SAMPLES, SIZES)
    assert np.array_equal(found.features, again.features)


def test_a_sample_of_coordinates_is_not_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MAX_COORDINATES", 7)
    values = [torch.full((1, 70), 1.0078125, dtype=torch.bfloat16)] * STEPS
    exact = 70 * 1.0078125**2
    found = calibrate([values], [values], 1, SIZES)
    assert found.predictions == pytest.approx(np.full((1, STEPS, STEPS), exact), rel=1e-12)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("what", ["results", "features"])
def test_a_generation_that_left_out_steps_is_refused(what: str, branch: str) -> None:
    made = generation(("cond", "uncond"))
    del getattr(made, what)[branch if what == "results" else (branch, 0)][0]
    with pytest.raises(DispatchError, match="did not run all steps"):
        made.calibrate()


def test_samples_of_several_generations_stand_side_by_side() -> None:
    first, second = (generation(branches).calibrate() for branches in (("",), ("a", "b")))
    both = merge_calibrations([first, second])
    for name in ("predictions", "features"):
        assert np.array_equal(getattr(both, name), np.concatenate([getattr(first, name), getattr(second, name)]))
    for name in ("changes", "ratios"):
        assert getattr(both, name) == pytest.approx((getattr(first, name) + getattr(second, name)) / 2)
    assert both.step_sizes.tolist() == SIZES


def moved(scheduler: Any) -> np.ndarray:
    """How far each step of a scheduler moves by a prediction of one, in units of its own signal level.

    The signal level is what the step makes of latents of one where the prediction is zero.
    """
    signal, sizes = 1.0, []
    for timestep in scheduler.timesteps:
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        again = copy.deepcopy(scheduler)
        by_latents = again.step(zero, timestep, one).prev_sample.item()
        by_prediction = scheduler.step(one, timestep, zero).prev_sample.item()
        signal *= by_latents
        sizes.append(by_prediction / signal)
    return np.array(sizes)


def flow(**options: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(STEPS, **({"mu": 0.8} if options.get("use_dynamic_shifting") else {}))
    return scheduler


def solver(**options: Any) -> Any:
    scheduler = DPMSolverMultistepScheduler(solver_order=1, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def euler(**options: Any) -> Any:
    scheduler = EulerDiscreteScheduler(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def ddim(**options: Any) -> Any:
    scheduler = DDIMScheduler(clip_sample=False, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


SCHEDULERS: dict[str, Any] = {
    "flow": flow,
    "flow, shifted": lambda: flow(shift=3.0),
    "flow, shifted by the size": lambda: flow(use_dynamic_shifting=True),
    "euler": lambda: euler(timestep_spacing="leading"),
    "dpm++": solver,
    "dpm++, karras": lambda: solver(use_karras_sigmas=True),
    "dpm++ of flows": lambda: solver(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "dpm++, to the smallest level": lambda: solver(final_sigmas_type="sigma_min"),
    "ddim": ddim,
    "ddim, trailing": lambda: ddim(timestep_spacing="trailing"),
    "ddim, to the first level": lambda: ddim(set_alpha_to_one=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_step_sizes_are_how_far_a_prediction_moves_the_latents(name: str) -> None:
    found = step_sizes(SCHEDULERS[name]())
    expected = moved(SCHEDULERS[name]())
    # the signal level before the first step is a unit that all steps share
    assert found / found[0] == pytest.approx(expected / expected[0], rel=1e-3)
    assert found.dtype == np.float64
    assert (found[:-1] < 0).all()


def test_flow_matching_steps_are_differences_of_the_sigmas() -> None:
    scheduler = flow(shift=3.0)
    assert step_sizes(scheduler) == pytest.approx(np.diff(scheduler.sigmas.double().numpy()), abs=0)
    assert step_sizes(scheduler).sum() == pytest.approx(-scheduler.sigmas[0].item())


def test_a_scheduler_that_tells_nothing_has_equal_steps() -> None:
    assert step_sizes(SimpleNamespace(timesteps=torch.arange(4))).tolist() == [-0.25] * 4


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    calibration = generation().calibrate()
    file = tmp_path / "folder" / "calibration.safetensors"
    save_calibration(calibration, file)
    read = load_calibration(file)
    for each in fields(Calibration):
        assert np.array_equal(getattr(read, each.name), getattr(calibration, each.name))
        assert getattr(read, each.name).dtype == np.float64
    assert list(file.parent.iterdir()) == [file]


def spoilt(content: bytes) -> Mapping[str, bytes]:
    other = b"\x10\x00\x00\x00\x00\x00\x00\x00{}" + b" " * 14
    return {
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "not of this form": b"\xff" * 100,
        "no arrays": other,
    }


@pytest.mark.parametrize("damage", ["empty", "cut off", "not of this form", "no arrays", "missing"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "calibration.safetensors"
    save_calibration(generation().calibrate(), file)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(spoilt(file.read_bytes())[damage])
    with pytest.raises(
        ArtifactError, match=r"calibration\.safetensors: no calibration .*it is then made anew"
    ) as caught:
        load_calibration(file)
    assert "\n" not in str(caught.value)
