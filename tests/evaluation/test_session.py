"""`recache-compile evaluate`: true values, kept work, one clear line for what cannot be done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import recache_compile as rc
from recache_compile.artifact.restore import with_config
from recache_compile.config import CompileConfig
from recache_compile.evaluation import session
from recache_compile.evaluation.metrics import features_of_reference, judge_of
from recache_compile.evaluation.request import EvaluationRequest, base_config
from recache_compile.evaluation.result import EvaluationResult, read_result
from recache_compile.evaluation.runner import KEPT, PICTURES, read_values
from recache_compile.evaluation.session import evaluate
from recache_compile.evaluation.setting import FIRST_OF_REFERENCE, read_setting
from recache_compile.evaluation.statistics import frechet
from recache_compile.ir.schedule import Schedule
from recache_compile.models.registry import EMBEDDED
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.prompts import captions_of
from recache_compile.pipelines.rollout import Rollouts
from tests.cli.test_app import check_refused, run
from tests.conftest import EVALUATION
from tests.families import TINY

STEPS, SAMPLES, BATCH = 8, 8, 4


def evaluation(out: Path, *changes: object) -> Any:
    return run(*EVALUATION, "--out", out, *changes)


def refused(result: Any, *says: str) -> None:
    for each in says:
        check_refused(result, each)


@pytest.fixture
def own(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(evaluated, tmp_path / "evaluation"))


@pytest.fixture(scope="module")
def result(evaluated: Path) -> EvaluationResult:
    return read_result(evaluated)


@pytest.fixture
def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("this was drawn before")

    monkeypatch.setattr(Rollouts, "generate", forbidden)


@pytest.fixture(scope="module")
def drawn(evaluated: Path) -> dict[str, Tensor]:
    """The same samples by the public functions, and the uncached ones by the original pipeline alone."""
    setting, found = read_setting(evaluated), read_result(evaluated)
    captions = [setting.prompts[at % len(setting.prompts)] for at in range(SAMPLES)]

    def draw(pipeline: Any, first: int = 0) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(first + seed) for seed in range(SAMPLES)]
        return pipeline(captions, num_inference_steps=STEPS, generator=noise, output_type="pt").images

    pictures = {"uncached": draw(load_pipeline("shapes"))}
    for line in found.lines:
        pipeline = load_pipeline("shapes")
        compiled = rc.compile(
            pipeline,
            budgets=(line.budget,),
            num_steps=STEPS,
            policy={line.budget: line.recompute_steps},
            runtime="eager",
            call={"prompt": captions},
        )
        pictures[f"{line.policy} {line.budget}"] = draw(rc.accelerate(pipeline, compiled))
    return pictures


@pytest.mark.parametrize("name", ["psnr", "ssim", "attributes"])
def test_values_are_the_means_of_samples_that_the_pipeline_itself_draws(
    name: str, result: EvaluationResult, drawn: dict[str, Tensor]
) -> None:
    captions = captions_of("shapes", None)[:SAMPLES]
    for line in result.lines:
        values = (
            judge_of(name, "shapes")(drawn[f"{line.policy} {line.budget}"], drawn["uncached"], captions)
            .double()
            .numpy()
        )
        assert line.values[name].value == pytest.approx(values.mean(), rel=1e-3)
        assert line.values[name].error == pytest.approx(values.std(ddof=1) / SAMPLES**0.5, rel=0.02, abs=1e-9)


def test_fid_is_the_distance_to_rendered_scenes_of_the_captions(
    result: EvaluationResult, drawn: dict[str, Tensor]
) -> None:
    features = {name: judge_of("fid", "shapes")(each, each, ()).double().numpy() for name, each in drawn.items()}
    expected = frechet(features["uncached"], features_of_reference(EMBEDDED["shapes"], captions_of("shapes", None)))
    assert result.uncached["fid"].value == pytest.approx(expected, rel=1e-3)
    for line in result.lines:
        cached = frechet(
            features[f"{line.policy} {line.budget}"],
            features_of_reference(EMBEDDED["shapes"], captions_of("shapes", None)),
        )
        assert line.values["fid"].value == pytest.approx(cached, rel=1e-3)
        assert "fid" not in line.losses  # there are fewer samples than features


def test_every_policy_is_evaluated_at_every_budget(result: EvaluationResult) -> None:
    assert [(line.policy, line.budget) for line in result.lines] == [
        ("uniform", 2), ("uniform", 4), ("front-loaded", 2), ("front-loaded", 4),
    ]  # fmt: skip
    assert [line.recompute_steps for line in result.lines[:2]] == [(0, 4), (0, 2, 4, 6)]


def test_costs_are_those_of_the_artifact(result: EvaluationResult, evaluated: Path) -> None:
    compiled = rc.load(evaluated / "engines")
    for line in result.lines:
        schedules = {line.budget: Schedule(line.recompute_steps, STEPS)}
        cost = compiled.engines.with_plans(schedules, compiled.forecaster).cost(line.budget)
        assert (line.macs_reduction, line.history_bytes, line.table_bytes) == (
            cost.macs_reduction,
            cost.history_bytes,
            cost.table_bytes,
        )
        assert line.speedup is not None
        assert line.speedup > 0
    assert result.facts.parameters == sum(weight.numel() for weight in compiled.weights.values())


def test_what_is_kept_is_not_drawn_again(own: Path, no_generation: None) -> None:
    before = (own / "result.json").read_text()
    again = evaluation(own)
    assert again.exit_code == 0, again.output
    assert json.loads((own / "result.json").read_text())["lines"] == json.loads(before)["lines"]


def test_a_stopped_evaluation_goes_on(own: Path, result: EvaluationResult, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "batches" / "1.safetensors").unlink()
    (own / "result.json").unlink()
    made: list[Schedule] = []
    generate = Rollouts.generate

    def counted(self: Rollouts, schedule: Schedule, batch: Any) -> Tensor:
        made.append(schedule)
        assert batch.seeds == (4, 5, 6, 7)
        return generate(self, schedule, batch)

    monkeypatch.setattr(Rollouts, "generate", counted)
    assert evaluation(own).exit_code == 0
    assert len(made) == 1 + len({line.recompute_steps for line in result.lines})
    assert read_result(own).lines == result.lines


def test_another_metric_takes_only_what_it_needs(own: Path) -> None:
    again = evaluation(own, "--metrics", "psnr,caption")
    assert again.exit_code == 0, again.output
    found = read_result(own)
    assert set(found.lines[0].values) == {"psnr", "caption"}
    assert "ssim" in read_values(own, 0)[read_setting(own).masks[0]]
    assert found.lines[0].target == "unknown"
    assert "unknown" in again.stdout


def test_another_policy_joins_those_that_are_known(own: Path, result: EvaluationResult) -> None:
    again = evaluation(own, "--policy", "0,1,7", "--budgets", "3")
    assert again.exit_code == 0, again.output
    assert [(line.policy, line.budget) for line in read_result(own).lines] == [
        ("uniform", 3),
        ("front-loaded", 3),
        ("0,1,7", 3),
    ]
    assert result.lines[0].recompute_steps == (0, 4)


def test_pictures_of_the_first_samples_are_kept(evaluated: Path, drawn: dict[str, Tensor]) -> None:
    setting = read_setting(evaluated)
    kept = torch.cat([read_values(evaluated, number)[setting.uncached][PICTURES] for number in (0, 1)])
    assert kept.shape == (KEPT, 3, 32, 32)
    assert (kept.float() / 255 - drawn["uncached"][:KEPT]).abs().max() < 0.01


def test_the_reference_set_has_other_noise_and_only_features(evaluated: Path) -> None:
    setting = read_setting(evaluated)
    seeds = [set(setting.batch(number).seeds) for number in (0, 1, FIRST_OF_REFERENCE, FIRST_OF_REFERENCE + 1)]
    assert len(set.union(*seeds)) == 4 * BATCH
    assert setting.wanted(FIRST_OF_REFERENCE) == {setting.uncached: ("fid",)}


def test_pictures_of_a_folder_are_a_reference(own: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(read_values(own, 0)[read_setting(own).uncached][PICTURES]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    assert evaluation(own, "--reference", pictures).exit_code == 0
    found = read_result(own)
    assert found.reference == f"the pictures in {pictures}"
    refused(evaluation(own, "--reference", tmp_path / "evaluation"), "holds 0 pictures")
    refused(evaluation(own, "--reference", pictures, "--metrics", "psnr"), "is for metric fid")


def test_samples_are_rounded_up_to_whole_batches(own: Path) -> None:
    assert evaluation(own, "--samples", 5, "--metrics", "psnr").exit_code == 0
    assert read_result(own).samples == 8


def test_the_redundancy_of_every_block_is_told(evaluated: Path) -> None:
    profile = json.loads((evaluated / "profile.json").read_text())
    sites, changes = profile["redundancy"]["sites"], profile["redundancy"]["changes"]
    names = {site.partition(" ")[0] for site in sites}
    assert names == {
        *(f"transformer_blocks.{block}" for block in range(2)),
        *(f"single_transformer_blocks.{block}" for block in range(4)),
    }
    assert all(row[0] is None and all(change > 0 for change in row[1:]) for row in changes)
    assert {len(row) for row in changes} == {STEPS}
    assert set(profile["budgets"]) == {"2", "4", "8"}
    assert all(
        len(each["steps"]) == STEPS and each["spread"] == [each["total"]] * 2 for each in profile["budgets"].values()
    )


def test_json_tells_all_of_it(own: Path) -> None:
    found = evaluation(own, "--json")
    facts = json.loads(found.stdout)
    assert facts["out"] == str(own)
    assert {"model", "samples", "lines", "uncached", "machine", "versions", "date"} <= set(facts)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two pictures at once."""
    folder = tmp_path_factory.mktemp("artifacts") / "shapes"
    compiled = run(
        "shapes",
        "--budgets",
        "2,4",
        "--steps",
        STEPS,
        "--runtime",
        "eager",
        "--batch",
        2,
        "--policy",
        "uniform",
        "--output",
        folder,
    )
    assert compiled.exit_code == 0, compiled.output
    return folder


def test_an_artifact_is_evaluated_with_its_own_schedules(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    found = run("evaluate", artifact, "--samples", 4, "--batch", 2, "--out", out, "--metrics", "psnr", "--repeats", 1)
    assert found.exit_code == 0, found.output
    lines = read_result(out).lines
    assert [(line.policy, line.budget, line.recompute_steps) for line in lines] == [
        ("as compiled", 2, (0, 4)),
        ("as compiled", 4, (0, 2, 4, 6)),
    ]
    assert not (out / "engines").exists()
    refused(run("evaluate", artifact, "--steps", 9, "--out", out), "--steps 9", "was compiled with 8")
    wrong = run("evaluate", artifact, "--samples", 3, "--batch", 3, "--out", tmp_path / "other")
    refused(wrong, "compiled", "compile for them too")


def test_a_prompt_that_an_artifact_was_compiled_with_is_not_judged_against_others(
    artifact: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    loaded = rc.load(mine)
    with_config(loaded, call={"prompt": "a red circle", "guidance_scale": 1.0}).save(mine)
    for config in (None, base_config(str(mine))):
        setting = EvaluationRequest(str(mine), config=config, metrics=("psnr",)).setting()
        assert setting.config.call == {"guidance_scale": 1.0}


def test_an_artifact_without_its_pipeline_says_what_to_do(eager_artifact: Path, tmp_path: Path) -> None:
    refused(
        run("evaluate", eager_artifact, "--out", tmp_path / "x"), "was compiled from Python", "evaluate the pipeline's"
    )
    assert not (tmp_path / "x").exists()


def test_an_artifact_that_was_replaced_is_another_evaluation(artifact: Path, tmp_path: Path) -> None:
    mine, out = Path(shutil.copytree(artifact, tmp_path / "artifact")), tmp_path / "evaluation"
    arguments = ("evaluate", mine, "--samples", 2, "--batch", 2, "--out", out, "--metrics", "psnr", "--repeats", 1)
    assert run(*arguments).exit_code == 0
    loaded = rc.load(mine)
    loaded.refit({name: weight * 1.01 for name, weight in loaded.weights.items()}, strict=False)
    loaded.save(mine)
    refused(run(*arguments), "another digest", "name another folder")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--metrics", ""), ("none is named",)),
        (("--metrics", "nice"), ("metric 'nice' is unknown", "choose psnr")),
        (("--prompts", "nowhere.txt"), ("nowhere.txt", "cannot be read")),
        (("--budgets", "0"), ("budget 0",)),
        (("--budgets", "9"), ("budget 9",)),
        (("--policy", "0,3,5"), ("no schedule for budget 2",)),
        (("--policy", "clever"), ("policy 'clever'", "trained policy's folder")),
        (("--forecaster", "magic"), ("magic",)),
        (("--runtime", "magic"), ("magic",)),
        (("--runtime", "tensorrt_rtx", "--device", "cpu"), ("tensorrt_rtx",)),
        (("--call", '{"prompt": "x"}'), ("use --prompts",)),
        (("--reference", "nowhere"), ("nowhere",)),
        (("--samples", "0"), ("--samples",)),
        (("--ray-address", "localhost:1"), ("--workers",)),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    changes: tuple[str, ...], says: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    refused(evaluation(out, *changes), *says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "name"), [(("--steps", "9"), "num_steps"), (("--seed", "1"), "seed"), (("--batch", "2"), "batch_size")]
)
def test_another_evaluation_in_the_same_folder_is_refused(change: tuple[str, ...], name: str, evaluated: Path) -> None:
    before = read_setting(evaluated)
    refused(evaluation(evaluated, *change), f"another {name}", "name another folder")
    assert read_setting(evaluated) == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(evaluation(tmp_path), "holds something that is no evaluation")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_batch_is_named(own: Path) -> None:
    batch = own / "batches" / "0.safetensors"
    batch.write_bytes(b"no tensors")
    refused(evaluation(own), "0.safetensors: damaged", "remove it")
    assert batch.read_bytes() == b"no tensors"


@pytest.mark.slow
def test_workers_find_the_same(own: Path, result: EvaluationResult) -> None:
    pytest.importorskip("ray")
    shutil.rmtree(own / "batches")
    found = evaluation(own, "--workers", 2)
    assert found.exit_code == 0, found.output
    assert read_result(own).lines == result.lines


def test_videos_are_judged_by_their_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two guidance branches."""
    tiny = TINY["wan-2.1"]
    call = tiny.call(0)

    def load_captioned(*_: Any, **__: Any) -> Any:
        pipeline = tiny.make()

        def draw(self: Any, prompt: list[str], num_inference_steps: int = 50, **given: Any) -> Any:
            embeds = {name: call[name].repeat(len(prompt), 1, 1) for name in call if "embeds" in name}
            given["num_inference_steps"] = num_inference_steps
            return type(pipeline).__mro__[1].__call__(self, **{**call, **embeds, **given})

        pipeline.__class__ = type("Captioned", (type(pipeline),), {"__call__": draw})
        return pipeline

    monkeypatch.setattr(session, "load_pipeline", load_captioned)
    config = CompileConfig(8, runtime="eager")
    request = EvaluationRequest("some/video", (3,), ("uniform",), config, metrics=("psnr",), samples=2)
    found = evaluate(request, tmp_path / "video")
    setting = read_setting(tmp_path / "video")
    steps = torch.Generator().manual_seed(1)
    made = load_captioned()(["x"], num_inference_steps=8, generator=[steps], output_type="pt").frames[0]
    kept = read_values(tmp_path / "video", 1)[setting.uncached][PICTURES][0]
    assert (kept.float() / 255 - made[made.shape[0] // 2]).abs().max() < 0.01
    assert found.lines[0].target == "unknown"
    assert 10 < (found.lines[0].values["psnr"].value or 0) < 99
    assert run("report", tmp_path / "video", "--output", tmp_path / "page.html").exit_code == 0
