"""Several processes lower the programs of one model; what one cannot do is done in this process."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recache_compile.compiler import side_by_side
from recache_compile.compiler.side_by_side import Helpers, Job
from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_to_json
from recache_compile.runtimes.inductor import Inductor
from tests.compiler.writing import LOWERED, Written
from tests.conftest import compile_flux, tiny_flux

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many processes as torch may use threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return dict(compile_flux(tiny_flux()).variants[0].programs)


def lowered_by(programs: dict[str, Program], runtime: Written, folder: Path) -> dict[str, int]:
    """Which process has lowered which program."""
    LOWERED.clear()
    jobs = [Job(each, [folder / f"{name}.txt", folder / f"{name}.process"]) for name, each in programs.items()]
    helpers = Helpers(runtime, CPU)
    try:
        helpers.lower(jobs, runtime.lowering_facts(CPU), lambda job: runtime.lower(job.program, CPU, job.files))
    finally:
        helpers.close()
    assert [job.files[0].read_text() for job in jobs] == [*map(program_to_json, programs.values())]
    return {job.program.name: int(job.files[1].read_text()) for job in jobs}


@pytest.mark.usefixtures("two_threads")
def test_another_process_lowers_some_and_this_one_begins_with_the_largest(
    programs: dict[str, Program], tmp_path: Path
) -> None:
    by = lowered_by(programs, Written(owner=os.getpid()), tmp_path)
    largest = max(programs.values(), key=lambda program: program.num_calls).name
    assert LOWERED[0] == largest
    assert by[largest] == os.getpid()
    assert len(set(by.values())) == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("elsewhere", ["dies", "fails", "differs"])
def test_what_another_process_cannot_do_is_done_in_this_one(
    elsewhere: str, programs: dict[str, Program], tmp_path: Path
) -> None:
    runtime = Written(owner=os.getpid(), elsewhere=elsewhere)  # type: ignore[arg-type]
    assert set(lowered_by(programs, runtime, tmp_path).values()) == {os.getpid()}
    assert sorted(LOWERED) == sorted(programs)


@pytest.mark.usefixtures("two_threads")
def test_what_another_process_does_not_finish_is_done_in_this_one(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "LONGEST_SECONDS", 0.2)
    runtime = Written(owner=os.getpid(), elsewhere="hangs")
    assert set(lowered_by(programs, runtime, tmp_path).values()) == {os.getpid()}


def test_a_process_that_cannot_be_told_its_runtime_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[subprocess.Popen[bytes]] = []

    def fail(process: "subprocess.Popen[bytes]", what: object) -> None:
        told.append(process)
        raise BrokenPipeError

    monkeypatch.setattr(side_by_side, "_send", fail)
    with pytest.raises(BrokenPipeError):
        side_by_side._started(Written())
    assert told[0].returncode is not None


def test_helpers_import_nothing_from_the_folder_that_the_user_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), ".", str(side_by_side.ROOT), "elsewhere"])
    assert side_by_side._places() == [str(side_by_side.ROOT), "elsewhere"]


def test_as_many_programs_are_expected_as_there_are(
    programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path))
    asked: list[Helpers] = []
    monkeypatch.setattr(Helpers, "start", lambda self: asked.append(self))
    compiled = compile_flux(tiny_flux(), batching=True)
    assert {helpers.programs for helpers in asked} == {len(compiled.variants[0].programs)}
    assert len(programs) == side_by_side.PROGRAMS


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", ["one program", "not apart"])
def test_no_process_is_started_where_it_would_not_help(
    case: str, programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(side_by_side, "_started")
    few = {"forecast": programs["forecast"]} if case == "one program" else programs
    lowered_by(few, Written(owner=os.getpid() if case == "one program" else 0), tmp_path)
    assert sorted(LOWERED) == sorted(few)


def test_no_process_is_started_where_torch_has_one_thread(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delattr(side_by_side, "_started")
    lowered_by(programs, Written(owner=os.getpid()), tmp_path)
    assert sorted(LOWERED) == sorted(programs)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_inductor_makes_the_same_kernels_without_the_weights(programs: dict[str, Program], tmp_path: Path) -> None:
    program, runtime = programs["forecast"], Inductor()
    before = runtime.lowering_facts(CPU)
    runtime.lower(program, CPU, [tmp_path / "here.pt2"])
    assert runtime.lowering_facts(CPU) == before
    process = side_by_side._started(runtime)
    assert side_by_side._ask(process, Job(program, [tmp_path / "apart.pt2"]), runtime, runtime.lowering_facts(CPU))
    process.kill()
    process.wait()
    kernels, engines = [], []
    for name in ("here.pt2", "apart.pt2"):
        kernels.append(kernels_of(tmp_path / name))
        engines.append(runtime.load(program, [tmp_path / name], program.weights, CPU))
    assert kernels[0] == kernels[1]
    inputs = [torch.rand([3 if size is None else size for size in value.shape]) for value in program.inputs]
    assert all(map(torch.equal, engines[0](inputs), engines[1](inputs)))


def kernels_of(package: Path) -> list[bytes]:
    """The kernels in a package, without comments, which name files."""
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".kernel.cpp"))
        lines = archive.read(name).splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith(b"//")]
