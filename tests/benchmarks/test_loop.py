"""The benchmark script runs and its structural numbers hold; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_loop_benchmark_runs_at_a_tiny_size(tmp_path: Path) -> None:
    sizes = ["--blocks=1,1", "--width=64", "--tokens=16", "--text-tokens=4", "--steps=6", "--budget=2", "--rounds=1"]
    command = [sys.executable, "benchmarks/loop.py", *sizes, "--runtimes=eager", "--json", str(tmp_path / "loop.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=500)
    result = json.loads((tmp_path / "loop.json").read_text())
    assert result["runtimes"]["eager"]["artifact_bytes"] <= result["runtimes"]["eager"]["weight_bytes"] + 150_000
    assert result["held_bytes"]["eager"] > 0
    assert result["macs_reduction"] > 2
