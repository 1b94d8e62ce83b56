"""The stages for a GPU run on the CPU at tiny sizes; no time is asserted."""

import json
import subprocess
import sys
import time
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
    assert {"tests", "loop", "flux-12b", "guidance", "memory", "offload", "refit"} == set(found)
    assert all(each["exit"] == 0 for each in found.values())
    assert all(each["result"] for name, each in found.items() if name != "tests")
    assert found["refit"]["result"]["error"] <= 1e-5 < found["refit"]["result"]["change"]
    loop = found["loop"]["result"]
    assert loop["runtimes"]["eager"]["artifact_bytes"] <= loop["runtimes"]["eager"]["weight_bytes"] + 150_000
    assert loop["held_bytes"]["eager"] > 0
    assert loop["macs_reduction"] > 2
    (tmp_path / "refit.json").unlink()
    again = gpu("--dry-run", "--only", "memory,refit", "--output", str(tmp_path))
    assert "refit: new weights" in again.stderr
    assert "memory: has its result" in again.stderr


def test_stages_are_listed_and_unknown_ones_refused(tmp_path: Path) -> None:
    listed = gpu("--list")
    assert listed.returncode == 0
    assert "flux-12b" in listed.stdout
    refused = gpu("--dry-run", "--only", "flux", "--output", str(tmp_path))
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == ["Error: --only flux: no such stage; see --list"]


def test_what_a_stage_has_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    command = "import sys; sys.path.insert(0, 'benchmarks'); from gpu import run_limited; "
    command += f"print(run_limited([sys.executable, '-c', {script!r}], 2)[0])"
    ended = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["None"]
    time.sleep(5)
    assert not mark.exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = gpu("--dry-run", "--wheels", str(tmp_path / "empty"), "--output", str(tmp_path))
    assert refused.returncode == 1
    assert "no wheels there" in refused.stderr
