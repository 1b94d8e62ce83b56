"""The command line: several batches in one artifact, other types and granularities, and plans."""

import json
from pathlib import Path

import pytest
from PIL import Image

from recache_compile.artifact.store import load
from tests.cli.test_app import SMALL, run
from tests.conftest import PROMPT


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "block"
    options = ["--granularity", "block", "--dtype", "bfloat16", "--batch", "1,2", "--call", '{"guidance_scale": 2.0}']
    result = run("shapes", "--budgets", "3", *SMALL, *options, "--output", folder)
    assert result.exit_code == 0, result.output
    assert "11 cache sites" in result.stderr
    assert result.stderr.index("MB per anchor") < result.stderr.index("lowering")
    return folder


def test_several_batches_share_their_weights(artifact: Path) -> None:
    compiled = load(artifact)
    shapes = [{value.name: value.shape for value in variant.inputs} for variant in compiled.variants]
    assert [each["hidden_states"][0] for each in shapes] == [1, 2]
    first, second = (variant.programs["recompute"].weights for variant in compiled.variants)
    own = {name for name in first if not name.startswith("constant_")}
    assert own
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in own)


def test_the_artifact_knows_its_type_and_its_call(artifact: Path, tmp_path: Path) -> None:
    facts = json.loads(run("inspect", artifact, "--json").stdout)["description"]["config"]
    assert (facts["granularity"], facts["dtype"], facts["call"]) == ("block", "bfloat16", {"guidance_scale": 2.0})
    result = run("run", artifact, PROMPT, "--output", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "picture.png").size == (256, 256)


def test_a_plan_needs_no_weights_and_tells_all_granularities() -> None:
    facts = json.loads(run("plan", "shapes", "--budgets", "3,6", "--steps", "6", "--json").stdout)
    assert [each["granularity"] for each in facts["sites"]] == ["output", "stack", "block", "module"]
    assert [each["budget"] for each in facts["budgets"]] == [3, 6]
    assert facts["config"]["num_steps"] == 6
    assert {each["name"] for each in facts["programs"]} == {"prologue", "recompute", "forecast"}


def test_a_plan_is_a_table_for_people() -> None:
    result = run("plan", "shapes", "--steps", "20")
    assert result.exit_code == 0, result.output
    assert "granularity" in result.stdout
    assert "a row" in result.stdout


@pytest.mark.slow
def test_flux_at_full_size_is_planned_without_weights() -> None:
    facts = json.loads(run("plan", "flux.1-dev", "--json").stdout)
    programs = {each["name"]: each for each in facts["programs"]}
    assert 1 - facts["step_parameters"] / facts["parameters"] >= 0.27
    assert programs["forecast"]["calls"] <= 30
    kinds = [name.partition(".")[2].partition("_")[0] for name in facts["boundary"] if name.startswith("recompute.")]
    assert kinds.count("row") <= 2
    assert kinds.count("fixed") <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nosuch"], "models that come with the package: flux.1-dev"),
        (["plan", "nosuch.json"], "nosuch.json: cannot be read"),
        (["plan", "shapes", "--granularity", "blok"], "granularity 'blok' is unknown; choose output, stack, block"),
        (["plan", "pixart-sigma", "--budgets", "30"], "budget 30: expected 1..20"),
        (["shapes", "--size", "32"], "size '32': expected WIDTHxHEIGHT"),
        (["shapes", "--size", "32x32"], "unexpected keyword argument 'width'"),
        (["shapes", "--batch", "0"], "batch '0': expected 1 or more"),
        (["shapes", "--call", "[]"], "expected a JSON object"),
        (["shapes", "--component", "transformer_2"], "has no transformer_2 to compile; it has transformer"),
        (["shapes", "--granularity", "module", "--residual"], "residual caching needs granularity 'stack' or 'block'"),
        (["shapes", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    options = [] if arguments[0] == "plan" else [*SMALL, "--output", tmp_path / "a"]
    steps = [] if "--budgets" in arguments else ["--budgets", "3"]
    result = run(*arguments, *steps, *options)
    assert result.exit_code != 0
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "a").exists()
