"""The benchmark of growing models runs; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def scale(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/scale.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_every_stage_and_size_of_a_tiny_model_is_found(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = scale("--models", "2,3", "--width", "64", "--runtime", "eager", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    models = json.loads(file.read_text())["models"]
    assert {name: each["blocks"] for name, each in models.items()} == {"2": 2, "3": 3}
    for each in models.values():
        lowered = {f"lower {program}" for program in each["nodes"]}
        assert {"capture", "cache points", "split", "count", "rest", "save", "load"} | lowered == set(each["stages"])
        assert each["peak_bytes"] > each["weight_bytes"]
        assert set(each["generation"]) == {"ours", "eager"}
    assert models["3"]["artifact_bytes"] > models["2"]["artifact_bytes"] > models["2"]["weight_bytes"]
    assert "3 blocks" in done.stdout


def test_unknown_models_are_refused() -> None:
    refused = scale("--models", "4,sdxl")
    assert refused.returncode == 2
    assert "'sdxl': expected a number of blocks from 2, or wan-1.3b" in refused.stderr
