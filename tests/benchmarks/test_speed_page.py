"""The page of benchmarks is made of results as they are committed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_made_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed_page import write_page

    write_page(ROOT / "benchmarks" / "results", tmp_path)
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "<!--" not in page


def test_stages_that_take_longer_per_block_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed_page import growth

    small = {"blocks": 4, "stages": {"capture": 1.0, "split": 1.0, "save": 0.01}}
    large = {"blocks": 12, "stages": {"capture": 2.9, "split": 9.0, "save": 0.1}}
    wan = {"blocks": None, "stages": {"capture": 99.0}}
    told = "From 4 to 12 blocks (× 3.0), these grow faster than the blocks: "
    assert growth({"4": small, "12": large, "wan": wan}) == f"{told}split (× 9.0)."
    assert growth({"4": small, "12": small | {"blocks": 12}}) == f"{told}nothing."
