"""Artifacts: the same results after loading, and nothing damaged is taken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import recache_compile as rc
from recache_compile.artifact.manifest import signed
from recache_compile.errors import ArtifactError
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, RUNTIMES, flux_inputs, loop_inputs

TOLERANCE = 1e-6
"""Of float32 matrix products, which may round differently with the alignment of the weights in memory."""


def generation(compiled: rc.Compiled, budget: int = 3, seed: int = 0) -> list[torch.Tensor]:
    run = compiled.dispatcher(budget)
    return [run(step=step, **loop_inputs(step, flux_inputs(seed)))[0] for step in range(NUM_STEPS)]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_loaded_artifact_gives_the_same_results(runtime: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{runtime}_artifact")
    loaded = rc.load(folder)
    assert loaded.schedules == request.getfixturevalue(runtime).schedules
    expected = generation(request.getfixturevalue(runtime))
    assert max(map(relative_error, generation(loaded), expected)) <= TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_are_stored_once(runtime: str, request: pytest.FixtureRequest) -> None:
    folder, compiled = request.getfixturevalue(f"{runtime}_artifact"), request.getfixturevalue(runtime)
    weight_bytes = sum(weight.nbytes for weight in compiled.weights.values())
    assert (folder / "weights.safetensors").stat().st_size <= weight_bytes + 100_000
    stored = {name for name in load_file(folder / "weights.safetensors") if name.startswith("weights/")}
    assert stored == {f"weights/{name}" for name in compiled.weights}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_loading_imports_neither_the_model_nor_diffusers(
    runtime: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{runtime}_artifact")
    torch.save([loop_inputs(step, flux_inputs()) for step in range(NUM_STEPS)], tmp_path / "inputs.pt")
    script = f"""
import sys, torch
import recache_compile as rc
run = rc.load({str(folder)!r}).dispatcher(budget=3)
calls = torch.load({str(tmp_path / "inputs.pt")!r})
results = [run(step=step, **inputs)[0] for step, inputs in enumerate(calls)]
assert "diffusers" not in sys.modules, "diffusers was imported"
torch.save(results, {str(tmp_path / "results.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    expected = generation(request.getfixturevalue(runtime))
    assert max(map(relative_error, torch.load(tmp_path / "results.pt"), expected)) <= TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_engines_read_the_one_copy_of_the_weights(runtime: str, request: pytest.FixtureRequest) -> None:
    loaded = rc.load(request.getfixturevalue(f"{runtime}_artifact"))
    loaded.weights["proj_out.weight"].zero_()
    run = loaded.dispatcher(budget=3)
    for step in range(2):  # a recompute step and a cached one
        (result,) = run(step=step, **loop_inputs(step, flux_inputs()))
        assert torch.equal(result, loaded.weights["proj_out.bias"].expand_as(result))


def test_saving_again_replaces_an_artifact(eager: rc.Compiled, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    eager.save(folder)
    eager.save(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    rc.load(folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_loaded_artifact_can_be_saved_again(runtime: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(f"{runtime}_artifact")
    rc.load(folder).save(tmp_path / "copy")
    again = rc.load(tmp_path / "copy")
    expected = generation(request.getfixturevalue(runtime))
    assert max(map(relative_error, generation(again), expected)) <= TOLERANCE
    shutil.copytree(folder, tmp_path / "own")
    loaded = rc.load(tmp_path / "own")
    loaded.save(tmp_path / "own")
    assert max(map(relative_error, generation(rc.load(tmp_path / "own")), expected)) <= TOLERANCE


def test_a_failed_save_leaves_the_old_artifact(
    eager: rc.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    eager.save(folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recache_compile.artifact.store.save_file", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        eager.save(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    rc.load(folder)


def test_a_folder_with_other_files_is_not_replaced(eager: rc.Compiled, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds something that is no artifact"):
        eager.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy", dirs_exist_ok=True))


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest | changes
    (folder / "manifest.json").write_text(signed(facts))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact"):
        rc.load(tmp_path / "nothing")


def test_an_older_format_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    edit_manifest(folder, format_version=1)
    with pytest.raises(ArtifactError, match="format 1, of an older version of recache-compile; compile again"):
        rc.load(folder)


def test_a_newer_format_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    edit_manifest(folder, format_version=99, something_new=[1])
    with pytest.raises(ArtifactError, match="format 99, this version reads up to 7; upgrade"):
        rc.load(folder)


def test_an_extra_file_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    (folder / "programs" / "extra.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not part of the artifact"):
        rc.load(folder)


def test_a_file_outside_the_folder_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "outside.json").write_text("{}")
    edit_manifest(folder, files=manifest["files"] | {"../outside.json": "sha256:0"})
    with pytest.raises(ArtifactError, match="missing from the artifact"):
        rc.load(folder)


@pytest.mark.slow
def test_engines_of_another_torch_are_refused(inductor_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(inductor_artifact, tmp_path)
    edit_manifest(folder, requirements={"torch": "1.0.0", "machine": "x86_64"})
    with pytest.raises(
        ArtifactError, match=r"engines are for cpu, torch 1\.0\.0, .* this is .*; run recache-compile rebuild"
    ):
        rc.load(folder)


def broken_plans() -> list[Any]:
    def slot(plan: dict[str, Any]) -> None:
        plan["steps"][0]["slot"] = 7

    def short(plan: dict[str, Any]) -> None:
        plan["steps"].pop()

    def row(plan: dict[str, Any]) -> None:
        plan["steps"][1]["row"] = [9]

    def steps(plan: dict[str, Any]) -> None:
        plan["recompute_steps"] = [1, 2]

    return [slot, short, row, steps]


@pytest.mark.parametrize("change", broken_plans(), ids=lambda change: change.__name__)
def test_a_plan_that_makes_no_sense_is_refused(change: Any, eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    plans = json.loads((folder / "manifest.json").read_text())["plans"]
    change(plans["3"])
    edit_manifest(folder, plans=plans)
    with pytest.raises(ArtifactError, match=str(folder)):
        rc.load(folder)


@pytest.mark.parametrize(
    "changes",
    [{"variants": []}, {"device": "cpx"}, {"variants": [{"inputs": [{}], "constants": [], "programs": [], "macs": 1}]}],
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: Any, eager_artifact: Path, tmp_path: Path) -> None:
    folder = copy_of(eager_artifact, tmp_path)
    edit_manifest(folder, **changes)
    with pytest.raises(ArtifactError, match=str(folder)):
        rc.load(folder)


def test_shapes_with_one_timetable_and_weights_with_one_memory_can_be_saved(tmp_path: Path) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(2, 4)
            self.register_buffer("one", both[0])
            self.register_buffer("two", both[1])

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample * self.one + timestep.sin()[:, None] * self.two

    examples = [{"sample": torch.ones(size, 4), "timestep": torch.ones(1)} for size in (2, 3)]
    compiled = rc.compile(
        Shared(),
        examples,
        budgets=(2,),
        num_steps=3,
        granularity="output",
        runtime="eager",
        timesteps={"timestep": torch.ones(3, 1)},
    )
    compiled.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    for example in examples:
        assert torch.equal(
            loaded.dispatcher(budget=2)(step=0, **example), compiled.dispatcher(budget=2)(step=0, **example)
        )


def test_a_rename_that_fails_brings_the_old_artifact_back(
    eager: rc.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    eager.save(folder)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        eager.save(folder)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    rc.load(folder)


@pytest.mark.slow
def test_instructions_that_a_processor_lacks_are_named_with_the_command_that_rebuilds(
    inductor_artifact: Path, tmp_path: Path
) -> None:
    folder = copy_of(inductor_artifact, tmp_path)
    built = json.loads((folder / "manifest.json").read_text())["requirements"]
    assert set(built) == {"torch", "machine", "instructions"}
    edit_manifest(folder, requirements={**built, "instructions": f"{built['instructions']} and amxnext"})
    with pytest.raises(
        ArtifactError, match=r"engines are for cpu, .* instructions, this is instructions without amxnext"
    ):
        rc.load(folder)
    edit_manifest(folder, requirements={**built, "instructions": built["instructions"].partition(" and ")[0]})
    rc.load(folder)
