"""The stages for a GPU run on the CPU at tiny sizes; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False)


@pytest.mark.slow
def test_a_dry_run_leaves_a_result_of_every_stage_and_goes_on_where_it_was(tmp_path: Path) -> None:
    done = gpu("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert {"tests", "loop", "flux-12b", "guidance", "memory", "offload", "refit", "onnxruntime"} <= set(found)
    assert all(each["exit"] == 0 for each in found.values())
    assert all(each["result"] for name, each in found.items() if name != "tests")
    assert found["refit"]["result"]["error"] <= 1e-5
    loop = found["loop"]["result"]
    assert loop["runtimes"]["eager"]["artifact_bytes"] <= loop["runtimes"]["eager"]["weight_bytes"] + 150_000
    assert loop["held_bytes"]["eager"] > 0
    assert loop["macs_reduction"] > 2
    (tmp_path / "refit.json").unlink()
    again = gpu("--dry-run", "--only", "memory,refit", "--output", str(tmp_path))
    assert "refit" in again.stderr
    assert "memory" not in again.stderr


def test_stages_are_listed_and_unknown_ones_refused(tmp_path: Path) -> None:
    listed = gpu("--list")
    assert listed.returncode == 0
    assert "flux-12b" in listed.stdout
    refused = gpu("--only", "flux", "--output", str(tmp_path))
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == ["Error: --only flux: no such stage; see --list"]


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = gpu("--dry-run", "--wheels", str(tmp_path / "empty"), "--output", str(tmp_path))
    assert refused.returncode == 1
    assert "no wheels there" in refused.stderr
