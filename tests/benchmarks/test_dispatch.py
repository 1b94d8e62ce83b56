"""The benchmark of the dispatcher itself runs; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_kind_of_step_is_timed(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/dispatch.py", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())["microseconds"]
    assert set(found) == {"1 branch", "2 branches"}
    assert all(set(kinds) == {"first step", "recompute step", "cached step"} for kinds in found.values())
