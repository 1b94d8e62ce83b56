"""`recache-compile schedules`: policies side by side."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from recache_compile.cli.app import main
from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.load import load_pipeline
from recache_compile.policies import registry
from recache_compile.policies.base import Problem
from recache_compile.search.compare import (
    Compared,
    calibration_of,
    compare_policies,
    make_question,
    print_compared,
    timeline,
)
from recache_compile.search.default_policy import CALIBRATIONS
from tests.conftest import PROMPT

SMALL = ["--steps", "8", "--budgets", "2,3"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["schedules", *(str(argument) for argument in arguments)])


def test_a_table_shows_policies_budgets_steps_and_timelines(tmp_path: Path) -> None:
    result = run("uniform", "front-loaded:power=2", *SMALL)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["uniform", "2", "█···█···"] in lines
    assert ["0", "4"] in lines
    assert ["front-loaded:power=2", "2", "█·█·····"] in lines
    assert "error" not in result.stdout
    assert "picture" in result.stdout
    with Image.open(tmp_path / "schedules.png") as picture:
        assert picture.format == "PNG"


def test_a_narrow_page_folds_the_names_and_keeps_all_numbers() -> None:
    name, budget = "front-loaded:power=2", 5
    schedules = {name: {budget: Schedule((0, 12, 24, 36, 49), 50)}}
    stream = io.StringIO()
    page = Console(file=stream, width=80)
    print_compared(Compared(50, "taylor", 1, schedules, {name: {budget: 0.0123456}}), page)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert [line[-1] for line in lines[1:3]] == ["error", "0.0123"]
    assert timeline(schedules[name][budget]) in lines[2]


def test_json_is_one_object_with_the_promised_keys(tmp_path: Path) -> None:
    result = run("uniform", "0,1,7", "--steps", 8, "--budgets", 3, "--order", 2, "--output", "other.png", "--json")
    facts = json.loads(result.stdout)
    assert facts == {
        "num_steps": 8,
        "forecaster": "taylor",
        "order": 2,
        "policies": {"uniform": {"3": [0, 2, 5]}, "0,1,7": {"3": [0, 1, 7]}},
        "errors": None,
        "model": None,
        "picture": "other.png",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["other.png"]


def test_a_model_gives_schedules_that_look_at_it_and_their_errors() -> None:
    result = run("uniform", "dp", "gram", *SMALL, "--forecaster", "fitted", "--model", "shapes", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["model"] == "shapes"
    assert facts["errors"]["gram"]["3"] <= facts["errors"]["uniform"]["3"]  # gram starts there
    for name in ("uniform", "dp", "gram"):
        assert [len(steps) for steps in facts["policies"][name].values()] == [2, 3]
        assert facts["errors"][name]["2"] > 0


def test_the_table_has_a_column_of_errors_with_a_model() -> None:
    result = run("uniform", "--steps", 4, "--budgets", "2,4", "--model", "shapes")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["policy", "budget", "recompute", "steps", "error"] in rows
    assert ["4", "████", "0"] in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'POLICY...'"),
        (["best"], "neither a policy"),
        (["uniform", "uniform"], "policy uniform: is repeated"),
        (["uniform:speed=2"], "no option 'speed'"),
        (["dp"], "policy dp: needs a few full generations of a model; name the model with --model"),
        (["annealing"], "policy annealing: searches on the true loss; use `recache-compile train`"),
        (["0,3"], "no schedule for budget 3"),
        (["uniform", "--budgets", "9"], "expected 1..8"),
        (["uniform", "--steps", "0"], "at least one step"),
        (["uniform", "--forecaster", "best"], "forecaster 'best' is unknown"),
        (["uniform", "--forecaster", "fitted"], "forecaster fitted: needs a few full generations of a model; name"),
        (["uniform", "--order", "-1"], "order -1"),
        (["uniform", "--output", "/proc/nothing/s.png"], "cannot be written"),
        (["uniform", "--model", "nonsense"], "not an embedded model"),
    ],
)
def test_bad_input_gets_one_clear_line_and_no_picture(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*SMALL, *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert result.exit_code != 0
    assert len(errors) == 1
    assert message in errors[0]
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["best"], ["uniform", "--budgets", "9"], ["uniform", "--order", "-1"]])
def test_everything_is_checked_before_a_model_is_loaded(arguments: list[str]) -> None:
    result = run(*SMALL, *arguments, "--model", "shapes")
    assert result.exit_code != 0
    assert "loading shapes" not in result.stderr


@dataclass(frozen=True)
class OneMore:
    """Breaks its promise."""

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        return Schedule(tuple(range(budget + 1)), problem.num_steps)


def test_a_policy_that_gives_another_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.POLICIES, "uniform", OneMore)
    with pytest.raises(ScheduleError, match=r"OneMore.*: gave .* for budget 2"):
        compare_policies(make_question(("uniform",), (2,), 8, "taylor", 1))


def test_a_timeline_has_one_character_a_step() -> None:
    assert timeline(Schedule((0, 3, 5), 6)) == "█··█·█"


def test_calibration_runs_full_generations_and_leaves_the_pipeline_alone() -> None:
    pipeline = load_pipeline("shapes")
    transformer = pipeline.transformer
    calibration = calibration_of(pipeline, (PROMPT,), 4)
    assert pipeline.transformer is transformer
    assert calibration.predictions.shape == (CALIBRATIONS, 4, 4)
    assert calibration.features.shape == (CALIBRATIONS, 4, 4)
    assert not np.allclose(calibration.predictions[0], calibration.predictions[1])  # one prompt, other noise
