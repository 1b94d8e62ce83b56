"""What a server does with an artifact: damage, several threads, a kill in mid-write, weights kept away, new engines."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recache_compile as rc
from recache_compile.cli.app import main
from recache_compile.errors import ArtifactError
from recache_compile.runtimes._offload import OffloadedEngine
from recache_compile.runtimes.registry import RUNTIMES as REGISTRY
from recache_compile.support.log import told
from tests.artifact.test_store import TOLERANCE, edit_manifest, generation
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, RUNTIMES, flux_inputs, loop_inputs


class Executed(BaseException):
    """Something of a damaged artifact was loaded."""


DAMAGES = ("cut", "flip", "remove", "empty", "link", "extra", "outside", "unlisted", "newer")


def do_damage(data: st.DataObject, folder: Path) -> None:
    """Damage an artifact in one place."""
    damage = data.draw(st.sampled_from(DAMAGES))
    file = data.draw(st.sampled_from(sorted(file for file in folder.rglob("*") if file.is_file())))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    match damage:
        case "cut":
            file.write_bytes(content[:at])
        case "flip":
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        case "remove":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "link":
            shutil.copy(file, folder.with_name("elsewhere"))
            file.unlink()
            file.symlink_to(folder.with_name("elsewhere"))
        case "extra":
            (file.parent / "extra.py").write_bytes(content)
        case "outside":
            name = data.draw(st.sampled_from(["../elsewhere", "/etc/hostname", "programs/../../elsewhere"]))
            edit_manifest(folder, files=listed | {name: "sha256:0"})
        case "unlisted":
            edit_manifest(folder, files={name: listed[name] for name in list(listed)[at % len(listed) + 1 :]})
        case "newer":
            edit_manifest(folder, format_version=data.draw(st.integers(5, 1000)), invention=1)


@pytest.mark.parametrize("runtime", ["eager", "tensorrt", pytest.param("onnxruntime", marks=pytest.mark.slow)])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_refused_before_anything_is_executed(
    data: st.DataObject, runtime: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(request.getfixturevalue(f"{runtime}_artifact"), folder)
    do_damage(data, folder)

    def executed(*_: Any, **__: Any) -> None:
        raise Executed

    monkeypatch.setattr("recache_compile.artifact.store.restore", executed)
    monkeypatch.setattr("recache_compile.artifact.store.get_runtime", executed)
    with pytest.raises(ArtifactError) as caught:
        rc.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_with_mixed_budgets_do_not_mix_state(runtime: str, request: pytest.FixtureRequest) -> None:
    compiled = rc.load(request.getfixturevalue(f"{runtime}_artifact"))
    kinds = [(budget, seed) for budget in (3, NUM_STEPS) for seed in range(4)]
    alone = {kind: generation(compiled, *kind) for kind in kinds}
    work = random.Random(0).choices(kinds, k=200)

    def task(kind: tuple[int, int]) -> list[torch.Tensor]:
        with torch.no_grad():
            return generation(compiled, *kind)

    with ThreadPoolExecutor(4) as pool:
        for kind, results in zip(work, pool.map(task, work), strict=True):
            assert max(map(relative_error, results, alone[kind])) <= TOLERANCE


SAVING = """
import sys, torch
import recache_compile as rc
compiled = rc.load(sys.argv[1])
print("ready", flush=True)
while True:
    compiled.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_old_artifact_or_none(eager_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    expected = generation(rc.load(folder))
    for number in range(6):
        with subprocess.Popen([sys.executable, "-c", SAVING, str(folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05 + 0.013 * number)
            process.send_signal(signal.SIGKILL)
        if not folder.exists():
            shutil.copytree(eager_artifact, folder)
        assert max(map(relative_error, generation(rc.load(folder)), expected)) <= TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_of_the_prologue_are_on_the_device_only_while_it_runs(
    runtime: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(f"{runtime}_artifact")
    visitors: list[torch.Tensor] = []
    empty_like = torch.empty_like

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        visitors.append(empty_like(*args, **kwargs))
        return visitors[-1]

    monkeypatch.setattr("recache_compile.runtimes._offload.torch.empty_like", noted)
    compiled = rc.load(folder, offload_prologue=True)
    monkeypatch.undo()
    programs = compiled.variants[0].programs
    steps = {name for key, program in programs.items() if key != "prologue" for name in program.weights}
    own = set(programs["prologue"].weights) - steps
    assert isinstance(compiled.variants[0].engines["prologue"], OffloadedEngine)
    assert len(visitors) == len(own) > 10
    assert all(visitor.untyped_storage().nbytes() == 0 for visitor in visitors)
    assert max(map(relative_error, generation(compiled), generation(rc.load(folder)))) <= TOLERANCE
    assert (
        max(map(relative_error, generation(compiled, NUM_STEPS, 1), generation(rc.load(folder), NUM_STEPS, 1)))
        <= TOLERANCE
    )


def test_new_weights_reach_an_offloaded_prologue(eager_artifact: Path) -> None:
    compiled, whole = rc.load(eager_artifact, offload_prologue=True), rc.load(eager_artifact)
    run = compiled.dispatcher(3)
    run(step=0, **loop_inputs(0, flux_inputs()))
    changed = {name: 1.1 * whole.weights[name] for name in whole.description.weights if name in whole.weights}
    for each in (compiled, whole):
        each.refit(changed)
    result = run(step=0, **loop_inputs(0, flux_inputs()))[0]
    assert relative_error(result, whole.dispatcher(3)(step=0, **loop_inputs(0, flux_inputs()))[0]) <= TOLERANCE


def test_engines_that_do_not_fit_can_be_rebuilt_in_place(eager_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    expected = generation(rc.load(folder))
    edit_manifest(folder, requirements={"torch": "1.0.0"})
    with pytest.raises(ArtifactError, match=f"run recache-compile rebuild {folder}"):
        rc.load(folder)
    result = CliRunner().invoke(main, ["rebuild", str(folder)])
    assert result.exit_code == 0, result.output
    assert max(map(relative_error, generation(rc.load(folder)), expected)) <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "no artifact"),
        (("{artifact}", "--runtime", "cublas"), "runtime 'cublas' is unknown; choose auto, eager, inductor"),
        (("{artifact}", "--device", "cuda"), "there is no CUDA GPU here"),
        (("{tmp}/thesis.txt",), "no artifact"),
        (("{artifact}", "--runtime", "abacus", "--target", "sm89"), "runtime 'abacus' is unknown"),
        (("{artifact}", "--output", "{tmp}"), "holds something that is no artifact"),
    ],
)
def test_rebuilds_that_cannot_be_are_one_line(
    arguments: tuple[str, ...], message: str, eager_artifact: Path, tmp_path: Path
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    (tmp_path / "thesis.txt").write_text("years of work")
    before = (eager_artifact / "manifest.json").read_text()
    words = [word.format(artifact=eager_artifact, tmp=tmp_path) for word in arguments]
    result = CliRunner().invoke(main, ["rebuild", *words])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert (eager_artifact / "manifest.json").read_text() == before


@pytest.mark.slow
def test_lost_and_damaged_engines_can_be_rebuilt(onnxruntime_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnxruntime_artifact, tmp_path / "artifact"))
    (folder / "recompute.0.onnx").unlink()
    (folder / "prologue.0.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError):
        rc.load(folder)
    rc.rebuild(folder, "eager").save(folder)
    assert max(map(relative_error, generation(rc.load(folder)), generation(rc.load(onnxruntime_artifact)))) <= 1e-4


def test_what_is_no_engine_has_to_be_whole_for_a_rebuild(eager_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    (folder / "notes.txt").write_text("?")
    result = CliRunner().invoke(main, ["rebuild", str(folder)])
    assert result.exit_code != 0
    assert "notes.txt: not part of the artifact; remove it" in result.output


class Transposed(torch.nn.Module):
    """Its weight is not dense in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.linear.weight = torch.nn.Parameter(torch.randn(4, 4).t())

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states) * timestep


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_that_are_not_dense_are_read_right(runtime: str, tmp_path: Path) -> None:
    module, inputs = Transposed(), {"hidden_states": torch.randn(2, 4), "timestep": torch.ones(1)}
    compiled = rc.compile(
        module, inputs, budgets=(2,), num_steps=4, forecaster="reuse", granularity="output", runtime=runtime
    )
    compiled.save(tmp_path / "artifact")
    for each in (compiled, rc.load(tmp_path / "artifact")):
        assert relative_error(each.dispatcher(2)(step=0, **inputs), module(**inputs)) <= TOLERANCE


def test_rebuilding_leaves_cuda_graphs_out_where_there_are_none(eager_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    description = json.loads((folder / "manifest.json").read_text())["description"]
    edit_manifest(folder, description=description | {"config": description["config"] | {"cuda_graphs": True}})
    lines: list[str] = []
    with told(lines.append):
        rebuilt = rc.rebuild(folder, device="cpu")
    assert not rebuilt.description.config.cuda_graphs
    assert any(line.startswith("without CUDA graphs: ") for line in lines)


def test_an_artifact_of_an_unknown_runtime_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    description = json.loads((folder / "manifest.json").read_text())["description"]
    edit_manifest(folder, description=description | {"config": description["config"] | {"runtime": "abacus"}})
    with pytest.raises(rc.RecacheError, match="runtime 'abacus' is unknown"):
        rc.load(folder)
    assert "abacus" not in REGISTRY
