"""The command line: the main job, its JSON, and one clear line for every bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from recache_compile.cli.app import main
from recache_compile.models.registry import EMBEDDED
from tests.conftest import PROMPT

SMALL = ["--steps", "6", "--runtime", "eager", "--prompt", PROMPT]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "shapes"
    result = run("shapes", "--budgets", "2,4", *SMALL, "--output", folder)
    assert result.exit_code == 0, result.output
    assert "÷" in result.stdout
    return folder


def test_the_main_job_writes_an_artifact_and_a_picture(artifact: Path) -> None:
    assert (artifact / "manifest.json").is_file()
    assert Image.open(artifact.with_name("shapes.png")).width > 300


def test_json_is_one_object_with_the_promised_keys(tmp_path: Path) -> None:
    result = run("compile", "shapes", "--budgets", "2,6", *SMALL, "--output", tmp_path / "a", "--json")
    facts = json.loads(result.stdout)
    assert {"model", "artifact", "num_steps", "forecaster", "policy", "runtime", "budgets"} <= set(facts)
    keys = {"budget", "recompute_steps", "macs_reduction", "speedup", "psnr", "ssim"}
    assert [keys <= set(each) for each in facts["budgets"]] == [True, True]
    assert facts["budgets"][0]["recompute_steps"] == [0, 3]
    assert facts["budgets"][0]["macs_reduction"] > 2.5
    assert facts["budgets"][1]["psnr"] >= 60
    assert facts["budgets"][0]["psnr"] < facts["budgets"][1]["psnr"]


def test_run_draws_a_picture(artifact: Path, tmp_path: Path) -> None:
    result = run("run", artifact, PROMPT, "--budget", 4, "--seed", 3, "--output", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "picture.png").size == (256, 256)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_inspect_tells_the_plan(artifact: Path) -> None:
    facts = json.loads(run("inspect", artifact, "--json").stdout)
    assert facts["budgets"][0]["engines"] == [
        "recompute",
        "forecast",
        "forecast",
        "recompute",
        "forecast",
        "forecast",
    ]
    assert facts["hoisted_parameters"] / facts["parameters"] > 0.2
    assert [site["shape"] for site in facts["sites"]] == [[1, 64, 128]]
    page = run("inspect", artifact).stdout
    assert "#··#··" in page
    assert "hoisted" in page


def test_inspect_prints_a_program(artifact: Path) -> None:
    page = run("inspect", artifact, "--graph", "forecast").stdout
    assert "history_0_1" in page
    assert page.strip().splitlines()[-1].startswith("return")


def broken_artifact(artifact: Path, folder: Path) -> Path:
    shutil.copytree(artifact, folder)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense", "--budgets", "2", *SMALL], "not an embedded model"),
        (["shapes", "--budgets", "0", *SMALL], "budget 0"),
        (["shapes", "--budgets", "7", *SMALL], "expected 1..6"),
        (["shapes", "--budgets", "3,3", *SMALL], "repeated"),
        (["shapes", "--budgets", "two", *SMALL], "expected whole numbers"),
        (["shapes", "--budgets", "2", *SMALL, "--policy", "1,3"], "step 0 is missing"),
        (["shapes", "--budgets", "2", *SMALL, "--policy", "0,6"], "outside 0..5"),
        (["shapes", "--budgets", "3", *SMALL, "--policy", "0,4"], "no schedule for budget 3"),
        (["shapes", "--budgets", "2", *SMALL, "--policy", "best"], "neither a policy"),
        (["shapes", "--budgets", "2", *SMALL, "--forecaster", "best"], "forecaster 'best' is unknown"),
        (["shapes", "--budgets", "2", *SMALL, "--order", "-1"], "order -1"),
        (["shapes", "--budgets", "2", *SMALL, "--granularity", "atom"], "granularity 'atom' is unknown"),
        (["shapes", "--budgets", "2", "--steps", "6", "--runtime", "magic"], "runtime 'magic' is unknown"),
        (["shapes", "--budgets", "2", *SMALL, "--prompt", "an elephant"], "unknown"),
        (["shapes", "--budgets", "2", *SMALL, "--seed", str(2**70)], "is not in the range"),
        (["shapes", "--budgets", "2", *SMALL, "--output", "."], "is the working folder"),
        (["shapes", "--budgets", "2", "--stepps", "6"], "No such option"),
        (["shapes", "--budgets", "1", "--steps", "0"], "at least one step"),
        (["shapes", "--budgets", "2", *SMALL, "--output", "/proc/nothing/here"], "cannot be written"),
        (["shapes", "--budgets", "2", *SMALL, "--output", "x" * 300], "cannot be written"),
        (["shapes", "--budgets", "2", *SMALL, "--policy", "y" * 300], "neither a policy"),
        (["[/x]", "--budgets", "2", *SMALL], "model [/x]: not an embedded model"),
        (["z" * 300, "--budgets", "2", *SMALL, "--output", "out"], "not an embedded model"),
        (["run", "nothing", PROMPT], "no artifact"),
        (["inspect", "nothing"], "no artifact"),
        (["run"], "Missing argument"),
    ],
)
def test_bad_input_gets_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(run(*arguments), message)
    assert list(tmp_path.iterdir()) == []


def check_refused(result: Result, message: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert result.exit_code != 0
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    check_refused(run(tmp_path, "--budgets", "2", *SMALL, "--output", tmp_path / "out"), "holds no pipeline")


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "thesis.txt").write_text("years of work")
    check_refused(run("shapes", "--budgets", "2", *SMALL, "--output", folder), "holds something that is no artifact")
    (tmp_path / "photo.png").write_text("a holiday")
    check_refused(run("shapes", "--budgets", "2", *SMALL, "--output", tmp_path / "photo"), "would replace")
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "photo.png").read_text() == "a holiday"


def test_a_picture_never_replaces_a_device(artifact: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_refused(run("run", artifact, PROMPT, "--output", tmp_path / "pipe"), "is no regular file")
    assert (tmp_path / "pipe").is_fifo()


def test_a_local_folder_works_as_the_embedded_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EMBEDDED["shapes"].weights, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    result = run("mine", "--budgets", "2", *SMALL[:4], "--output", "out")
    assert result.exit_code == 0, result.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("run", "../out", PROMPT).exit_code == 0


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED["shapes"].weights, tmp_path / "mine"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: value for name, value in load_file(file).items() if name != "proj_out.weight"}, file, {"format": "pt"}
    )
    check_refused(run(folder, "--budgets", "2", *SMALL, "--output", tmp_path / "out"), "weights are missing")


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_refused(run("shapes", "--budgets", "2", *SMALL, "--output", tmp_path / "file"), "is a file")


def test_a_truncated_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    check_refused(run("run", broken_artifact(artifact, tmp_path / "broken"), PROMPT), "damaged")


def test_an_artifact_of_a_newer_format_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 8}))
    check_refused(run("inspect", tmp_path / "new"), "format 8, this version reads up to 7")


def test_unknown_budgets_and_programs_are_refused(artifact: Path, tmp_path: Path) -> None:
    check_refused(
        run("run", artifact, PROMPT, "--budget", 0, "--output", tmp_path / "p.png"), "budget 0: a budget is a whole"
    )
    check_refused(
        run("run", artifact, PROMPT, "--budget", "few", "--output", tmp_path / "p.png"), "budgets 'few': expected whole"
    )
    check_refused(run("inspect", artifact, "--graph", "magic"), "program 'magic' is not in the artifact")
    check_refused(run("run", artifact, PROMPT, "--output", "/proc/nothing/p.png"), "cannot be written")


@pytest.mark.slow
def test_inductor_without_a_compiler_is_refused_and_auto_says_what_it_takes(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nonexistent"}
    command = [
        sys.executable,
        "-m",
        "recache_compile.cli.app",
        "shapes",
        "--budgets",
        "2",
        "--steps",
        "4",
        "--output",
        "out",
    ]
    arguments = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    refused = subprocess.run([*command, "--runtime", "inductor"], **arguments)  # type: ignore[call-overload]
    assert refused.returncode != 0
    assert "no C++ compiler found; install g++" in refused.stderr.splitlines()[-1]
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "onnxscript.py").write_text("raise ImportError")
    environment["PYTHONPATH"] = f"{tmp_path / 'absent'}:{environment['PYTHONPATH']}"
    taken = subprocess.run([*command, "--runtime", "auto", "--prompt", PROMPT], **arguments)  # type: ignore[call-overload]
    assert taken.returncode == 0, taken.stderr
    assert "no C++ compiler found; install g++ or clang, or choose --runtime eager; using runtime eager" in taken.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_refused(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'g++ 12.2' && exit 0\necho broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    command = [
        sys.executable,
        "-m",
        "recache_compile.cli.app",
        "shapes",
        "--budgets",
        "2",
        "--steps",
        "4",
        "--output",
        "out",
    ]
    result = subprocess.run(
        [*command, "--runtime", "inductor"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode != 0
    assert "runtime inductor: the compiler failed on " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_help_and_version() -> None:
    assert "compile MODEL" in run("--help").output
    assert run("--version").output.startswith("recache-compile, version")
    assert "Usage" in run().output
    assert run("-h").output == run("--help").output
