"""The benchmark of changing adapters runs; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_what_is_changed_is_counted(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/adapters.py", "--width", "128", "--rounds", "1"]
    command += ["--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())["seconds"]
    assert set(found) == {"attention", "all linear layers"}
    some, most = (found[name]["changed"] / found[name]["parameters"] for name in found)
    assert 0 < some < 0.5
    assert 0.9 < most <= 1
