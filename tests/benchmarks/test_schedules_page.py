"""The page of schedules is made of results as they are committed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_made_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from schedules_page import write_page

    write_page(ROOT / "benchmarks" / "results", tmp_path)
    page = (tmp_path / "schedules.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    assert "<!--" not in page
    for picture in tmp_path.glob("*.png"):
        assert (ROOT / "docs" / picture.name).is_file()
