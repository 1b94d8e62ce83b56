"""`recache-compile train`: what it writes, that it goes on where it was stopped, and what it refuses."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from recache_compile.artifact.store import load
from recache_compile.evaluation import pretrained
from recache_compile.pipelines.rollout import Rollouts
from recache_compile.search.objective import TaskLosses
from recache_compile.search.runner import StudyRunner
from recache_compile.search.study import Task, held_out_batches, judging_batches, read_study
from tests.cli.test_app import check_refused, run
from tests.conftest import PROMPT, TRAINING

FILES = {"policy.json", "policy.safetensors", "schedules.png", "study", "training.png"}


def train(out: Path, *changes: object) -> Result:
    return run(*TRAINING, "--out", out, *changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "policy"))


@pytest.fixture
def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("this was run before")

    monkeypatch.setattr(Rollouts, "generate", forbidden)


def test_training_writes_a_policy_its_curves_and_its_study(trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == FILES
    for name in ("training.png", "schedules.png"):
        with Image.open(trained / name) as picture:
            assert picture.format == "PNG"
            assert picture.width > 300
    samples = {file.name for file in (trained / "study" / "samples").iterdir()}
    assert samples == {f"{number}.safetensors" for number in (0, 1, *held_out_batches(2), *judging_batches(2))}


def test_the_policy_tells_where_it_comes_from(trained: Path) -> None:
    facts = json.loads((trained / "policy.json").read_text())
    known = {
        "format_version": 1,
        "num_steps": 8,
        "model": "shapes",
        "forecaster": "taylor",
        "order": 1,
        "granularity": "stack",
        "method": "search",
        "distance": "features",
        "reward": "none",
        "alpha": 0.0,
        "training_samples": 4,
        "held_out_samples": 4,
        "seed": 0,
    }
    assert known.items() <= facts.items()
    assert [len(facts["schedules"][budget]) for budget in ("3", "4")] == [3, 4]
    for losses in facts["held_out_losses"].values():
        assert all(mean > 0 and error > 0 for mean, error in losses.values())


def losses_in(folder: Path) -> dict[tuple[int, str], list[float]]:
    lines = (folder / "study" / "losses.jsonl").read_text().splitlines()
    return {(number, mask): distances for number, mask, distances, _ in map(json.loads, lines)}


def test_the_losses_told_are_those_of_samples_that_nothing_was_decided_on(trained: Path) -> None:
    facts, losses = json.loads((trained / "policy.json").read_text()), losses_in(trained)
    one, two = judging_batches(2)
    for budget, steps in facts["schedules"].items():
        mask = "".join("1" if step in steps else "0" for step in range(8))
        values = losses[one, mask] + losses[two, mask]
        assert facts["held_out_losses"][budget]["trained"][0] == pytest.approx(sum(values) / 4)
    assert len([number for number, _ in losses if number in (one, two)]) <= 2 * 2 * 2  # trained and uniform, no others


def test_the_policy_gives_schedules_that_were_found_good(trained: Path) -> None:
    facts, losses = json.loads((trained / "policy.json").read_text()), losses_in(trained)
    for steps in facts["schedules"].values():
        mask = "".join("1" if step in steps else "0" for step in range(8))
        means = {
            other: sum(losses[0, other] + losses[1, other])
            for number, other in losses
            if number == 1 and other.count("1") == len(steps) and (0, other) in losses
        }
        assert len(means) >= 3
        assert means[mask] <= sorted(means.values())[1]


@pytest.mark.usefixtures("no_generation")
def test_the_same_command_again_runs_no_generation(own: Path) -> None:
    before = files(own)
    result = train(own, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["policy"] == str(own)
    assert facts["generations"] == 2 * len(losses_in(own))
    assert facts["schedules"].keys() == facts["held_out_losses"].keys() == {"3", "4"}
    after = files(own)
    assert {name for name in before if before[name] != after.get(name)} <= {"training.png", "schedules.png"}
    assert before.keys() == after.keys()


@pytest.mark.usefixtures("no_generation")
def test_a_table_is_for_people_and_progress_goes_to_stderr(own: Path) -> None:
    result = train(own)
    assert result.exit_code == 0, result.output
    assert "held-out loss after" in result.stdout
    for word in ("trained", "uniform", "policy ", "curves ", "schedules "):
        assert word in result.stdout
    assert "race k=4" in result.stderr
    assert "climb k=3" in result.stderr
    assert "calibrating" not in result.stdout


def without_results(trained: Path, out: Path) -> Path:
    """A folder in which the training has begun: the engines are compiled, nothing was run."""
    for name in ("study.json", "engines"):
        source, target = trained / "study" / name, out / "study" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    return out


def test_a_stopped_training_goes_on_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, proper, ran = without_results(trained, tmp_path / "policy"), StudyRunner.run, []

    def stopping(self: StudyRunner, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
        for row in proper(self, tasks):
            if len(ran) in stops:
                stops.remove(len(ran))
                raise KeyboardInterrupt
            ran.append(row[0])
            yield row

    stops = [0, 7, 30]
    monkeypatch.setattr(StudyRunner, "run", stopping)
    for _ in range(3):
        result = train(out)
        check_refused(result, "stopped; the same command with --out")
        assert "goes on from where it was" in result.stderr
        assert not (out / "policy.json").exists()
    with (out / "study" / "losses.jsonl").open("a") as stream:
        stream.write('[0, "1010')  # as if the process had been killed while it wrote
    result = train(out)
    assert result.exit_code == 0, result.output
    assert len(ran) == len(set(ran))  # none was run twice
    assert losses_in(out) == losses_in(trained)
    for name in ("policy.json", "policy.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()


def test_a_training_stopped_while_the_samples_are_made_goes_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, proper, left = without_results(trained, tmp_path / "policy"), Rollouts.uncached, [0, 1]

    def stopping(self: Rollouts, batch: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return proper(self, batch)

    monkeypatch.setattr(Rollouts, "uncached", stopping)
    check_refused(train(out), "stopped")
    assert len(list((out / "study" / "samples").iterdir())) == 2
    for name in ("0.safetensors", "1.safetensors"):
        ours, theirs = (folder / "study" / "samples" / name for folder in (out, trained))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_more_budgets_can_be_trained_in_the_same_folder(own: Path) -> None:
    before = losses_in(own)
    result = train(own, "--budgets", "4,2,3", "--method", "recache", "--effort", "0.01")
    assert result.exit_code == 0, result.output
    facts = json.loads((own / "policy.json").read_text())
    assert list(facts["schedules"]) == ["4", "2", "3"]
    assert facts["method"] == "recache"
    assert before.items() < losses_in(own).items()


def test_a_policy_of_other_budgets_is_not_replaced(own: Path) -> None:
    before = files(own)
    check_refused(train(own, "--budgets", "4,2"), "its policy is for 3, 4 too; add 3 to --budgets")
    assert files(own) == before


def test_the_policy_answers_for_its_number_of_steps_and_is_carried_over_to_others(
    trained: Path, tmp_path: Path
) -> None:
    options = ("--budgets", "3,4", "--output", tmp_path / "schedules.png")
    facts = json.loads(run("schedules", trained, "--steps", 8, *options, "--json").stdout)
    (schedules,) = facts["policies"].values()
    assert schedules == json.loads((trained / "policy.json").read_text())["schedules"]
    assert len(json.loads((trained / "policy.json").read_text())["levels"]) == 8
    with pytest.warns(UserWarning, match="trained for 8 steps, its schedule is carried over to 9"):
        facts = json.loads(run("schedules", trained, "--steps", 9, *options, "--json").stdout)
    (carried,) = facts["policies"].values()
    assert [len(carried[budget]) for budget in ("3", "4")] == [3, 4]


@pytest.mark.slow
def test_the_policy_is_taken_for_compiling(trained: Path, tmp_path: Path) -> None:
    options = ("--budgets", "3,4", "--steps", "8", "--runtime", "eager", "--prompt", PROMPT)
    result = run("compile", "shapes", "--policy", trained, *options, "--output", tmp_path / "artifact", "--json")
    facts = json.loads(result.stdout)
    expected = json.loads((trained / "policy.json").read_text())["schedules"]
    assert {str(each["budget"]): each["recompute_steps"] for each in facts["budgets"]} == expected
    assert facts["policy"] == str(trained)
    assert {str(k): [*each.recompute_steps] for k, each in load(tmp_path / "artifact").schedules.items()} == expected


def test_alpha_counts_where_there_is_a_reward_only(trained: Path) -> None:
    assert read_study(trained / "study").reward == "none"
    assert json.loads((trained / "policy.json").read_text())["alpha"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budgets", "1"], "budget 1: there is one schedule only; train for 2..7"),
        (["--budgets", "3,8"], "budget 8: there is one schedule only"),
        (["--budgets", "9"], "budget 9: expected 1..8"),
        (["--budgets", "3,3"], "repeated"),
        (["--steps", "1"], "is not in the range"),
        (["--distance", "best"], "distance 'best' is unknown; choose auto, mse"),
        (["--reward", "best"], "reward 'best' is unknown; choose none"),
        (["--forecaster", "best"], "forecaster 'best' is unknown"),
        (["--granularity", "atom"], "granularity 'atom' is unknown"),
        (["--order", "-1"], "order -1"),
        (["--runtime", "magic"], "runtime 'magic' is unknown"),
        (["--runtime", "tensorrt_rtx"], "tensorrt_rtx"),
        (["--method", "luck"], "is not one of"),
        (["--ray-address", "10.0.0.1:6379"], "--ray-address: name the number of its processes too, --workers N"),
        (["--prompts", "missing.txt"], "prompts missing.txt: cannot be read"),
        (["--held-out", "1"], "is not in the range"),
        (["--batch", "0"], "is not in the range"),
        (["--effort", "0"], "is not in the range"),
        (["--call", "[]"], "expected a JSON object"),
        (["--call", '{"output_type": "np"}'], "call: output_type cannot be set here"),
        (["--call", '{"prompt": "a cat"}'], "call: a prompt cannot be set here; use --prompts"),
        (["--out", "/proc/nothing/here"], "cannot be written"),
        (["--out", "x" * 300], "cannot be written"),
    ],
)
def test_bad_input_gets_one_clear_line_and_leaves_nothing_behind(
    changes: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(train(Path("policy"), *changes), message)
    assert list(tmp_path.iterdir()) == []


def test_another_model_s_captions_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("an elephant\na giraffe\n")
    check_refused(train(tmp_path / "policy", "--prompts", tmp_path / "prompts.txt"), "elephant")
    check_refused(run("train", "nonsense", "--distance", "mse", "--out", tmp_path / "policy"), "not an embedded model")
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_reward_without_its_weights_or_its_package_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "CLIP_WEIGHTS", str(tmp_path))
    check_refused(train(tmp_path / "policy", "--reward", "clip"), "reward clip: the weights")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    check_refused(train(tmp_path / "policy", "--reward", "hpsv2"), "pip install")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.png").write_text("a holiday")
    (tmp_path / "file").write_text("years of work")
    os.mkfifo(tmp_path / "pipe")
    for name in ("out", "file", "pipe"):
        check_refused(train(tmp_path / name), "holds something")
    (tmp_path / "out" / "study").mkdir()
    (tmp_path / "out" / "study" / "thesis.txt").write_text("years of work")
    check_refused(train(tmp_path / "out"), "holds something")
    assert files(tmp_path / "out") == {"training.png": b"a holiday", "study/thesis.txt": b"years of work"}


@pytest.mark.usefixtures("no_generation")
def test_a_folder_of_another_study_is_left_alone(own: Path) -> None:
    before = files(own)
    check_refused(train(own, "--seed", 1, "--batch", 4), "holds a study with another batch_size and seed")
    check_refused(train(own, "--forecaster", "reuse"), "another anchors and forecaster; name another folder")
    assert files(own) == before


@pytest.mark.usefixtures("no_generation")
def test_a_damaged_study_names_the_file(own: Path) -> None:
    losses = own / "study" / "losses.jsonl"
    first, *rest = losses.read_text().splitlines(keepends=True)
    losses.write_text("".join([first, "damaged\n", *rest]))
    check_refused(train(own), "line 2 is damaged")
    (own / "study" / "study.json").write_text("{}")
    check_refused(train(own), "study.json: cannot be read")
