"""Studies: what is kept in their folder is not made again, and the losses are true."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import recache_compile as rc
from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError, ModelError, RecacheError
from recache_compile.evaluation.distances import get_distance
from recache_compile.evaluation.rewards import get_reward
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.rollout import Batch, Rollouts
from recache_compile.search.objective import Losses
from recache_compile.search.runner import StudyRunner, build_study_engines
from recache_compile.search.study import (
    FIRST_HELD_OUT,
    Study,
    held_out_batches,
    is_begun,
    judging_batches,
    read_study,
    write_study,
)
from recache_compile.search.train import Effort, open_study

STEPS = 8
STUDY = Study(
    model="shapes",
    config=CompileConfig(num_steps=STEPS, runtime="eager", call={"guidance_scale": 2.0}),
    forecaster="taylor",
    distance="features",
    reward="caption",
    training_prompts=(
        "a red circle left of a blue square on a dark background",
        "a yellow triangle above a magenta ring on a checkered background",
        "a green cross right of a cyan diamond on a striped background",
    ),
    held_out_prompts=("a blue ring below a yellow square on a light background",),
    batch_size=2,
    seed=5,
)
SCHEDULES = tuple(Schedule(steps, STEPS) for steps in ((0, 2, 5), (0, 2, 6), (0, 4)))


@pytest.fixture(scope="session")
def folder(shapes: Any, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its engines, some samples and its calibration; do not write to it."""
    place = tmp_path_factory.mktemp("study") / "study"
    write_study(STUDY, place)
    shutil.copytree(trained / "study" / "engines", place / "engines")  # with guidance they are the same
    study_runner = StudyRunner(place, shapes)
    study_runner.prepare((0, 1, FIRST_HELD_OUT))
    study_runner.calibration()
    return place


@pytest.fixture(scope="session")
def study_runner(folder: Path, shapes: Any) -> StudyRunner:
    return StudyRunner(folder, shapes)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(folder, tmp_path / "study"))


def test_damaged_engines_are_named_with_the_folder_to_remove(own: Path) -> None:
    (own / "engines" / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match=rf"damaged .*; remove {own / 'engines'}, they are then compiled again"):
        StudyRunner(own)


def test_torch_gets_its_threads_back_when_a_study_is_closed(own: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_study(STUDY, own, Effort(1, 1)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Forbidden:
    """A function that must not be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was there already")


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    call = {"guidance_scale": 2.5, "negative_prompt": "Übel", "sigmas": [1.0, 0.5]}
    study = replace(STUDY, config=replace(STUDY.config, call=call, dtype="bfloat16"))
    assert not is_begun(study, tmp_path / "study")
    write_study(study, tmp_path / "study")
    assert read_study(tmp_path / "study") == study
    assert is_begun(study, tmp_path / "study")
    assert [file.name for file in (tmp_path / "study").iterdir()] == ["study.json"]


def test_the_same_study_goes_on(folder: Path) -> None:
    before = (folder / "study.json").stat().st_mtime_ns
    write_study(STUDY, folder)
    assert (folder / "study.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"config": replace(STUDY.config, num_steps=9)}, "num_steps"),
        ({"seed": 6, "batch_size": 4}, "batch_size and seed"),
        ({"training_prompts": STUDY.training_prompts[:2]}, "training_prompts"),
        ({"config": replace(STUDY.config, call={"guidance_scale": 3.0})}, "call"),
        (
            {"config": replace(STUDY.config, anchors=3), "forecaster": "hicache", "reward": "none"},
            "anchors and forecaster and reward",
        ),
    ],
)
def test_another_study_is_refused(change: dict[str, Any], names: str, folder: Path) -> None:
    for begin in (is_begun, write_study):
        with pytest.raises(ArtifactError, match=rf"study: holds a study with another {names}; name another folder$"):
            begin(replace(STUDY, **change), folder)
    assert read_study(folder) == STUDY


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ArtifactError, match="holds something that is no study; name another folder"):
            write_study(STUDY, place)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\0\0\0", json.dumps({"model": "shapes"}), json.dumps(asdict(STUDY) | {"batch_size": "many"})],
)
def test_a_damaged_study_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(
        ArtifactError, match=r"study\.json: cannot be read \(.+\); put the file back, or name another folder"
    ):
        write_study(STUDY, tmp_path)
    with pytest.raises(ArtifactError, match=r"study\.json: cannot be read"):
        StudyRunner(tmp_path)


def test_a_study_that_cannot_be_compiled_leaves_nothing_behind(shapes: Any, tmp_path: Path) -> None:
    study = replace(STUDY, training_prompts=("an elephant",))
    with pytest.raises(RecacheError, match="elephant"):
        build_study_engines(study, tmp_path / "study", shapes)
    assert list(tmp_path.iterdir()) == []


NUMBERS = st.integers(0, 500) | st.integers(0, 2000).map(lambda number: FIRST_HELD_OUT + number)


@given(st.integers(0, 2**63 - 1_000_000), st.integers(1, 64), st.lists(NUMBERS, min_size=2, max_size=6, unique=True))
def test_no_two_batches_have_noise_in_common(seed: int, batch_size: int, numbers: list[int]) -> None:
    study = replace(STUDY, seed=seed, batch_size=batch_size)
    seeds = [each for number in numbers for each in study.batch(number).seeds]
    assert len(set(seeds)) == len(seeds) == batch_size * len(numbers)
    torch.Generator().manual_seed(max(seeds))


@given(st.integers(1, 8), st.integers(0, 20))
def test_prompts_come_in_turn(batch_size: int, number: int) -> None:
    study = replace(STUDY, batch_size=batch_size)
    drawn = [prompt for each in range(number + 1) for prompt in study.batch(each).prompts]
    assert drawn == [STUDY.training_prompts[at % 3] for at in range(len(drawn))]
    held_out = {prompt for each in (*held_out_batches(3), *judging_batches(3)) for prompt in study.batch(each).prompts}
    assert held_out == set(STUDY.held_out_prompts)


def test_the_first_and_the_last_training_batch_stay_apart_from_those_held_out() -> None:
    last, first = STUDY.batch(FIRST_HELD_OUT - 1), STUDY.batch(FIRST_HELD_OUT)
    assert STUDY.batch(0).seeds == (5, 6)
    assert max(last.seeds) < min(first.seeds)


def test_everything_is_made_once(own: Path, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in own.rglob("*")}
    monkeypatch.setattr(Rollouts, "uncached", Forbidden())
    monkeypatch.setattr("recache_compile.search.runner.engines_of_pipeline", Forbidden())
    build_study_engines(STUDY, own, None)
    study_runner = StudyRunner(own, shapes)
    study_runner.prepare((0, 1, FIRST_HELD_OUT))
    study_runner.calibration()
    assert len(list(study_runner.run([(0, SCHEDULES[0].mask)]))) == 1
    assert {file: file.stat().st_mtime_ns for file in own.rglob("*")} == before
    with pytest.raises(AssertionError, match="was there already"):
        study_runner.prepare((2,))


def reference(shapes: Any, number: int, compiled: rc.Compiled | None, study: Study = STUDY) -> Tensor:
    """Pictures of a batch by a pipeline of its own: the original transformer, or a compiled one."""
    batch = study.batch(number)
    pipeline = type(shapes)(
        shapes.transformer, type(shapes.scheduler).from_config(shapes.scheduler.config), shapes.text_encoder
    )
    pipeline.set_progress_bar_config(disable=True)
    if compiled is not None:
        rc.accelerate(pipeline, compiled)
    generator = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    arguments = {"generator": generator, "num_inference_steps": STEPS, "output_type": "pt", **study.config.call}
    return pipeline(list(batch.prompts), **arguments).images.float()


@pytest.mark.parametrize("number", [1, FIRST_HELD_OUT])
def test_samples_are_those_of_the_original_model(
    number: int, study_runner: StudyRunner, folder: Path, shapes: Any
) -> None:
    torch.testing.assert_close(study_runner.uncached(number), reference(shapes, number, None), rtol=0, atol=1e-4)
    noise = load_file(folder / "samples" / f"{number}.safetensors")["noise"]
    seeds = STUDY.batch(number).seeds
    assert noise.shape == (2, 64, 48)
    for row, seed in zip(noise, seeds, strict=True):
        assert torch.equal(row, torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)))


def test_losses_are_those_of_an_accelerated_pipeline(
    study_runner: StudyRunner, folder: Path, shapes: Any, tmp_path: Path
) -> None:
    numbers, compiled = (0, FIRST_HELD_OUT), rc.load(folder / "engines")
    losses = Losses(tmp_path / "losses.jsonl", study_runner, 2, 2, 1, alpha=0.25).losses(SCHEDULES, numbers)
    full = {number: reference(shapes, number, None) for number in numbers}
    distance, reward = get_distance("features", "shapes"), get_reward("caption", "shapes")
    assert losses.shape == (len(SCHEDULES), 4)
    for schedule, row in zip(SCHEDULES, losses, strict=True):
        expected = []
        for number in numbers:
            made = reference(shapes, number, compiled.engines.with_plans({schedule.budget: schedule}, Taylor(1)))
            rewards = reward(made, STUDY.batch(number).prompts)
            expected += (distance(made, full[number]) - 0.25 * rewards).tolist()
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_loss_of_the_full_schedule_is_zero(study_runner: StudyRunner) -> None:
    ((_, distances, _),) = study_runner.run([(0, "1" * STEPS)])
    assert distances == pytest.approx((0, 0), abs=1e-9)


def test_losses_have_the_same_bits_whatever_else_is_run(study_runner: StudyRunner, folder: Path, shapes: Any) -> None:
    tasks = [(number, schedule.mask) for number in (1, 0) for schedule in SCHEDULES]
    together = {task: values for task, *values in study_runner.run(tasks)}
    assert list(together) == sorted(tasks)
    alone = {task: values for each in tasks[::3] for task, *values in StudyRunner(folder, shapes).run([each])}
    assert len(alone) == 2
    assert alone.items() <= together.items()


def test_the_fitted_forecaster_has_the_same_engines_and_lower_losses(
    own: Path, study_runner: StudyRunner, shapes: Any
) -> None:
    study = replace(STUDY, forecaster="fitted")
    (own / "study.json").write_text(json.dumps(asdict(study)))
    fitted = StudyRunner(own, shapes)
    ((_, ours, _),) = fitted.run([(0, SCHEDULES[0].mask)])
    compiled = fitted.engines.with_plans({3: SCHEDULES[0]}, fitted.forecaster())
    made = reference(shapes, 0, compiled, study)
    expected = get_distance("features", "shapes")(made, fitted.uncached(0))
    assert ours == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    ((_, taylor, _),) = study_runner.run([(0, SCHEDULES[0].mask)])
    assert sum(ours) < sum(taylor)


def test_noise_of_another_machine_is_refused(own: Path, shapes: Any) -> None:
    file = own / "samples" / "0.safetensors"
    tensors = load_file(file)
    tensors["noise"][0, 0, 0] += 1e-6
    save_file(tensors, file)
    study_runner = StudyRunner(own, shapes)
    with pytest.raises(ModelError, match="its seeds give another noise here than where it was begun"):
        list(study_runner.run([(0, SCHEDULES[0].mask)]))
    assert len(list(study_runner.run([(1, SCHEDULES[0].mask)]))) == 1


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_damaged_files_name_the_remedy(content: bytes, own: Path, shapes: Any) -> None:
    sample, calibration = own / "samples" / "0.safetensors", own / "calibration.safetensors"
    for file in (sample, calibration):
        file.write_bytes(content)
    study_runner = StudyRunner(own, shapes)
    with pytest.raises(ArtifactError, match=r"0\.safetensors: damaged \(.*\); remove it, it is then made anew"):
        study_runner.uncached(0)
    with pytest.raises(ArtifactError, match=r"calibration\.safetensors: no calibration \(.*\); remove it"):
        study_runner.calibration()
    for file in (sample, calibration):
        file.unlink()
    torch.testing.assert_close(study_runner.uncached(0), reference(shapes, 0, None), rtol=0, atol=1e-4)
    assert study_runner.calibration().num_steps == STEPS


def test_a_sample_without_its_noise_is_damaged(own: Path, shapes: Any) -> None:
    save_file({"uncached": torch.zeros(1)}, own / "samples" / "0.safetensors")
    with pytest.raises(ArtifactError, match=r"0\.safetensors: damaged \(no noise\)"):
        StudyRunner(own, shapes).uncached(0)


def test_the_calibration_is_of_the_original_predictions(
    study_runner: StudyRunner, shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Tensor] = []
    forward = shapes.transformer.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs.append(result[0].double())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(shapes.transformer, "forward", recorded)
        reference(shapes, 0, None)
    steps = torch.stack(outputs).unflatten(0, (STEPS, 2)).movedim(2, 0).flatten(3)  # sample, step, branch, coordinate
    gram = torch.einsum("asbc,atbc->ast", steps, steps).numpy()
    calibration = study_runner.calibration()
    np.testing.assert_allclose(calibration.predictions, gram, rtol=1e-4)
    assert calibration.features.shape == (2, STEPS, STEPS)
    np.testing.assert_allclose(calibration.step_sizes, np.diff(shapes_sigmas(shapes)), rtol=1e-6)


def shapes_sigmas(shapes: Any) -> np.ndarray:
    scheduler = type(shapes.scheduler).from_config(shapes.scheduler.config)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas.double().numpy()


def test_rollouts_tell_what_is_no_picture(folder: Path, shapes: Any) -> None:
    rollouts = Rollouts(shapes, rc.load(folder / "engines").engines, {**STUDY.config.call, "output_type": "np"})
    with pytest.raises(ModelError, match="ShapesPipeline: gives no pictures or frames as tensors, one for each prompt"):
        rollouts.generate(SCHEDULES[0], Batch(STUDY.training_prompts[:2], (1, 2)))
