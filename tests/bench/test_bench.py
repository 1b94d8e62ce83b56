"""Side by side: everyone recomputes the steps that are claimed, and what is told is true."""

import io
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import recache_compile as rc
from recache_compile.bench.page import read_bench, summary
from recache_compile.bench.session import BenchLine, BenchResult, run
from recache_compile.bench.subjects import OURS, SUBJECTS, available
from recache_compile.bench.workload import BenchRequest, make_workload, of_artifact, peers_schedule
from recache_compile.cli.app import main
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.support.log import told

T, K = 8, 3
COMMITTED = Path(__file__).parent.parent.parent / "benchmarks" / "results"

SPEC = {
    "name": "tiny",
    "num_steps": T,
    "dtype": "float32",
    "class": "FluxTransformer2DModel",
    "config": {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
    "inputs": {
        "hidden_states": {"shape": [1, 16, 8], "dtype": "float32"},
        "timestep": {"shape": [1], "dtype": "float32"},
        "guidance": {"shape": [1], "dtype": "float32"},
        "pooled_projections": {"shape": [1, 20], "dtype": "float32"},
        "encoder_hidden_states": {"shape": [1, 6, 24], "dtype": "float32"},
        "txt_ids": {"shape": [6, 3], "dtype": "float32"},
        "img_ids": {"shape": [16, 3], "dtype": "float32"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "tiny.json"
    file.write_text(json.dumps(SPEC))
    return file


@pytest.fixture(scope="module")
def artifact(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "artifact"
    with torch.no_grad():
        workload = make_workload(request(str(spec)))
        compiled = rc.compile(
            workload.module,
            workload.inputs,
            budgets=(K, 4),
            num_steps=T,
            runtime="eager",
            timesteps=workload.example.timesteps,
        )
        compiled.save(folder)
    return folder


def request(model: str, runtime: str = "eager") -> BenchRequest:
    return BenchRequest(model, K, CompileConfig(num_steps=T, runtime=runtime), threads=1)


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts calls of attention: there are some in every block that is computed."""
    count = [0]
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    yield count


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *product(("diffusers TaylorSeer", "diffusers TaylorSeer lite", "cache-dit"), ("flux-small", "wan-small")),
        ("cache-dit", "sd3-small"),
    ],
)
def test_peers_recompute_the_steps_that_ours_does(name: str, model: str, attentions: list[int]) -> None:
    if name not in available():
        pytest.skip("cache-dit is not installed")
    schedule, *_ = peers_schedule(T, K)
    subject = SUBJECTS[name](make_workload(request(model)), request(model), schedule)
    for _ in range(2):
        subject.begin()
        calls = []
        for step in range(T):
            attentions[0] = 0
            subject.step(step)
            calls.append(attentions[0])
        assert [step for step, count in enumerate(calls) if count == max(calls)] == list(schedule.recompute_steps)


def test_models_without_caches_are_refused_by_name() -> None:
    sd3 = request("sd3-small")
    with pytest.raises(ModelError, match="SD3Transformer2DModel has no enable_cache in diffusers"):
        SUBJECTS["diffusers TaylorSeer lite"](make_workload(sd3), sd3, peers_schedule(T, K)[0])


@pytest.mark.parametrize(("num_steps", "budget"), [(20, 5), (50, 10), (50, 7), (28, 9), (8, 7), (2, 1)])
def test_schedules_of_peers_have_the_budget(num_steps: int, budget: int) -> None:
    schedule, warmup, interval = peers_schedule(num_steps, budget)
    assert schedule.budget == budget
    computed = [
        step for step in range(num_steps) if step < warmup or (step > warmup and (step - warmup - 1) % interval == 0)
    ]
    assert computed == list(schedule.recompute_steps)


def test_a_budget_that_no_interval_has_is_refused() -> None:
    with pytest.raises(ModelError, match="budget 8 of 8 steps: no interval"):
        peers_schedule(8, 8)


@pytest.mark.slow
def test_a_run_tells_of_all_and_leaves_out_who_fails(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, *_ = peers_schedule(T, K)
    lines_told: list[str] = []
    names = ("eager", OURS, "diffusers TaylorSeer lite")
    monkeypatch.setitem(SUBJECTS, "broken", SUBJECTS["eager"])
    with told(lines_told.append):
        result = run(request(str(spec)), schedule, (*names, "broken"), 2)
    lines = {line.name: line for line in result.lines}
    assert tuple(lines) == names
    assert list(result.failed) == ["broken"]  # the children know no such subject
    assert any(line.startswith("left out: broken: KeyError") for line in lines_told)
    assert result.recompute_steps == schedule.recompute_steps
    assert lines["eager"].cached_step is None
    ours = lines[OURS]
    assert ours.cached_step is not None
    assert ours.cached_step < ours.recompute_step
    assert (ours.graphs, ours.graph_breaks, ours.recompiles) == (0, 0, 0)
    assert ours.disk_bytes is not None
    assert ours.more["weight_bytes"] < ours.disk_bytes
    assert ours.spread[0] <= ours.loop <= ours.spread[1]
    assert summary(result, OURS)["best_peer"] == names[2]
    assert json.loads(json.dumps(result.json()))["lines"][0]["speedup"] == 1


def test_an_artifact_brings_its_steps_and_budget(artifact: Path) -> None:
    found, schedule = of_artifact(request(str(artifact)), None, None)
    assert (found.num_steps, found.budget, schedule.budget) == (T, K, K)
    workload = make_workload(found)
    run_ = rc.load(artifact).dispatcher(K)
    result = run_(step=0, **workload.at(0))[0]
    assert torch.allclose(result, workload.module(**workload.at(0), return_dict=False)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flux-small", "--only", "eager,magic"), "only 'magic': unknown; choose among eager, torch.compile"),
        (("flux-small", "--compare", "{tmp}/nothing.json"), "nothing.json: cannot be read (No such file or directory)"),
        (("flux-small", "--steps", "8", "--budget", "8"), "budget 8 of 8 steps: no interval"),
        (("flux-small", "--device", "tpu"), "device tpu: unknown; choose cpu, cuda or cuda:1"),
        (("{artifact}", "--budget", "5"), "was compiled for 8 steps and budgets 3, 4"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, artifact: Path, tmp_path: Path) -> None:
    words = [word.format(tmp=tmp_path, artifact=artifact) for word in arguments]
    result = CliRunner().invoke(main, ["bench", *words])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def a_line(name: str, loop: float, cached: float | None, ideal: float) -> BenchLine:
    return BenchLine(name, loop, (0.9 * loop, 1.1 * loop), 0.2, cached, 1.0, 5.0, ideal, 3, 2, 1, 10**7, 10**9, None)


def a_result() -> BenchResult:
    lines = (a_line("eager", 4.0, None, 4.0), a_line(OURS, 1.0, 0.001, 0.98), a_line("cache-dit", 1.5, 0.02, 1.0))
    return BenchResult(
        "2026-01-01", "a machine", {"torch": "2"}, request("flux-small"), (0, 2, 5), 3, lines, {"other": "other: no"}
    )


def test_tables_tell_ratios_and_compare_with_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = a_result().json()
    before["lines"][1]["loop"] = 2.5
    (tmp_path / "before.json").write_text(json.dumps(before))
    monkeypatch.setattr("recache_compile.bench.session.run", lambda *_: a_result())
    monkeypatch.setattr("recache_compile.cli.bench.PAGE", Console(width=200, file=io.StringIO()))
    command = ["bench", "flux-small", "--steps", "8", "--compare", str(tmp_path / "before.json")]
    result = CliRunner().invoke(main, [*command, "--budget", "3"])
    assert result.exit_code == 0, result.output
    page = sys.modules["recache_compile.cli.bench"].PAGE.file.getvalue()
    ours = next(line for line in page.splitlines() if OURS in line)
    assert [cell.strip() for cell in ours.split("│")[2:9]] == [
        "1.000", "0.900 to 1.100", "4.00", "200.00", "1.000", "1.020", "2.50",
    ]  # fmt: skip
    assert "not measured: other: no" in page
    assert "1.50 times as fast as the fastest other cache (cache-dit)" in result.output
    other = CliRunner().invoke(main, [*command, "--budget", "4"])
    assert "before.json: is of budget 3; ask for the same" in other.output


def test_json_has_ratios_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recache_compile.bench.session.run", lambda *_: a_result())
    result = CliRunner().invoke(main, ["bench", "flux-small", "--json"])
    facts = json.loads(result.stdout)
    assert [line["speedup"] for line in facts["lines"]] == [1, 4, 4 / 1.5]
    assert (facts["best_peer"], facts["times_faster"]) == ("cache-dit", 1.5)


def test_a_run_that_was_kept_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**a_result().json(), "best_peer": "cache-dit", "of a later release": 1}))
    assert read_bench(file) == a_result()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text in ("{", "{}", "[1]", '{"lines": []}'):
        file.write_text(text)
        with pytest.raises(ModelError, match=r"run.json: is no result of bench --json \(.+\)") as caught:
            read_bench(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(COMMITTED.glob("bench-*.json")), ids=lambda file: file.stem)
def test_committed_runs_are_read(file: Path) -> None:
    assert read_bench(file).request.model == file.stem.removeprefix("bench-")
