"""The benchmark of concurrent requests runs, and what it tells of results and calls is true; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_results_are_those_of_lone_requests(tmp_path: Path) -> None:
    options = {"--requests": 3, "--budget": 2, "--rounds": 1, "--runtime": "eager", "--json": tmp_path / "found.json"}
    command = [sys.executable, "benchmarks/batching.py", *(str(word) for pair in options.items() for word in pair)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["largest_error"] <= 1e-3
    calls = {int(size): count for size, count in found["requests_per_call"].items()}
    assert sum(size * count for size, count in calls.items()) == 3 * 2
    assert set(found["seconds"]) == {
        "one after the other", "in threads", "batched", "one request alone", "one request alone, batcher",
    }  # fmt: skip
