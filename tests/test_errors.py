"""What other libraries' errors become."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import recache_compile as rc
from recache_compile.cli.app import main
from recache_compile.errors import RuntimeUnavailableError, check_memory
from tests.conftest import flux_inputs, tiny_flux

GPU = "CUDA out of memory. Tried to allocate 20.00 GiB"


def wrapped(error: Exception) -> Exception:
    try:
        raise ValueError("while tracing") from error
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError(GPU),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        wrapped(torch.OutOfMemoryError(GPU)),
    ],
)
def test_memory_that_ran_out_is_told_as_that(error: Exception) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"^out of memory: .*take a smaller size or batch"):
        check_memory(error)


def test_other_errors_pass() -> None:
    check_memory(wrapped(RuntimeError("sizes do not match")))


def out_of_memory(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError(GPU)


@pytest.mark.parametrize("where", ["capture.trace", "passes.prologue"])
def test_a_model_that_runs_out_of_memory_is_not_called_untraceable(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECACHE_CACHE_SIZE", "0")
    monkeypatch.setattr(f"recache_compile.{where}.export_module", out_of_memory)
    with pytest.raises(RuntimeUnavailableError, match=r"^out of memory: CUDA out of memory"):
        rc.compile(tiny_flux(), flux_inputs(), budgets=(2,), num_steps=4, runtime="eager")


def test_an_artifact_that_does_not_fit_into_memory_is_not_called_damaged(
    eager_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recache_compile.artifact.restore._read_tensors", out_of_memory)
    with pytest.raises(RuntimeUnavailableError, match=r"^out of memory: CUDA out of memory"):
        rc.load(eager_artifact)


def test_the_command_line_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recache_compile.api.find_weightless", out_of_memory)
    result = CliRunner().invoke(main, ["plan", "flux.1-dev"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: out of memory: {GPU}; take a smaller size")
