"""The benchmark of the first result runs; no time is asserted."""

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_both_tries_of_a_process_tell_their_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path))
    from first_result import TRIES, measure

    found = measure("flux-small", time.time(), "eager", len(TRIES))
    assert [each["try"] for each in found] == [name for name, _, _ in TRIES]
    assert {"capture", "split", "lower and load", "generation"} <= set(found[0]["stages"])
    assert "split" not in found[1]["stages"]  # the disk has it
