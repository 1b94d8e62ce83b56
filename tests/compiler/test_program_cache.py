"""Programs and engines that were made before are found, and only those."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import recache_compile as rc
from recache_compile.compiler import captures
from recache_compile.compiler.program_cache import read_split
from recache_compile.ir.serialize import program_to_json
from recache_compile.runtimes.onnxruntime import OnnxRuntime
from recache_compile.support.disk_cache import keep_entry
from tests.compiler.writing import LOWERED, Written
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, tiny_flux
from tests.passes.tiny import Plain, simple


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lowered() -> list[str]:
    LOWERED.clear()
    return LOWERED


ALL = ["recompute", "prologue", "forecast"]


def test_the_same_model_with_other_budgets_and_another_policy_lowers_nothing(
    lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_flux(tiny_flux(), runtime=Written())
    assert lowered == ALL
    monkeypatch.delattr(captures, "specialise")
    second = compile_flux(tiny_flux(), runtime=Written(), budgets=(2, 5), policy="front-loaded", forecaster="hicache")
    assert lowered == ALL
    ours, theirs = (compiled.variants[0].programs for compiled in (first, second))
    assert [*map(program_to_json, ours.values())] == [*map(program_to_json, theirs.values())]


def test_other_weights_have_the_same_engines_and_their_own_values(lowered: list[str]) -> None:
    compile_flux(tiny_flux(), runtime=Written())
    module = tiny_flux(seed=1)
    run = compile_flux(module, runtime=Written()).dispatcher(NUM_STEPS)
    assert lowered == ALL
    for step in range(2):
        inputs = loop_inputs(step, flux_inputs())
        torch.testing.assert_close(run(step=step, **inputs)[0], module(**inputs, return_dict=False)[0])


def test_another_order_costs_one_program(lowered: list[str]) -> None:
    compile_flux(tiny_flux(), runtime=Written())
    compile_flux(tiny_flux(), runtime=Written(), order=2)
    assert lowered == [*ALL, "forecast"]


def test_one_more_size_costs_its_own_programs(lowered: list[str]) -> None:
    for sizes in ([flux_inputs()], [flux_inputs(), flux_inputs(batch=2)]):
        rc.compile(tiny_flux(), sizes, budgets=(3,), num_steps=NUM_STEPS, runtime=Written())
    assert lowered == [*ALL, *ALL]


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "output"},
        {"runtime": Written(facts={"machine": "another"})},
        {"hoist": False},
    ],
)
def test_other_choices_lower_anew(options: Mapping[str, object], lowered: list[str]) -> None:
    compile_flux(tiny_flux(), runtime=Written())
    compile_flux(tiny_flux(), **({"runtime": Written()} | options))
    assert len(lowered) > len(ALL)


def test_variables_that_change_compilers_lower_anew(lowered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_flux(tiny_flux(), runtime=Written())
    monkeypatch.setenv("CXXFLAGS", "-O0")
    compile_flux(tiny_flux(), runtime=Written())
    assert lowered == [*ALL, *ALL]


def test_damaged_entries_are_made_anew(lowered: list[str], tmp_path: Path) -> None:
    compile_flux(tiny_flux(), runtime=Written())
    for file in (tmp_path / "cache" / "programs").iterdir():
        file.write_bytes(file.read_bytes()[:-4])
    compile_flux(tiny_flux(), runtime=Written())
    assert lowered == [*ALL, *ALL]


@pytest.mark.parametrize("parts", [(), (b"\xff",), (b"many",), (b"1", b"{}"), (b"1", b"no program")])
def test_a_split_that_cannot_be_parsed_is_not_there(parts: tuple[bytes, ...]) -> None:
    keep_entry("key", parts)
    assert read_split("key", simple(Plain()), torch.device("cpu")) is None


def test_a_rebuilt_artifact_has_the_same_engines(lowered: list[str], tmp_path: Path) -> None:
    compile_flux(tiny_flux()).save(tmp_path / "artifact")
    for _ in range(2):
        rc.rebuild(tmp_path / "artifact", Written())
    assert sorted(lowered) == sorted(ALL)


def test_a_runtime_says_whether_its_engines_can_be_kept(tmp_path: Path) -> None:
    compile_flux(tiny_flux())
    (entry,) = (tmp_path / "cache" / "programs").iterdir()  # what the model was split into
    assert entry.is_file()


@pytest.mark.slow
def test_models_for_onnx_runtime_are_kept_and_made_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_flux(tiny_flux(), runtime="onnxruntime")
    monkeypatch.setattr(OnnxRuntime, "lower", None)
    module = tiny_flux(seed=1)
    again = compile_flux(module, runtime="onnxruntime", budgets=(2, NUM_STEPS))
    ours, theirs = (
        {file.name: file.read_bytes() for file in each.engines.folder.glob("*.onnx")} for each in (compiled, again)
    )
    assert len(ours) == len(ALL)
    assert ours == theirs
    inputs = loop_inputs(0, flux_inputs())
    torch.testing.assert_close(
        again.dispatcher(2)(step=0, **inputs)[0], module(**inputs, return_dict=False)[0], rtol=1e-4, atol=1e-5
    )
