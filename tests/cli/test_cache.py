"""`recache-compile cache`, `cache clear` and `--cache-size`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from recache_compile.cli.app import main
from recache_compile.support.disk_cache import cache_limit, keep_entry
from tests.conftest import PROMPT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_cache_is_shown_and_cleared(folder: Path) -> None:
    keep_entry("key", (bytes(1000),))
    shown = run("cache")
    assert str(folder) in shown.output.replace("\n", "")
    assert "programs" in shown.output
    facts = json.loads(run("cache", "--json").output)
    assert (facts["folder"], facts["limit"]) == (str(folder), 8 * 10**9)
    assert [(part["name"], part["entries"]) for part in facts["parts"]] == [("programs", 1)]
    assert "removed 0.0 MB" in run("cache", "clear").output
    assert json.loads(run("cache", "--json").output)["parts"] == []
    assert "empty" in run("cache").output


def test_a_command_may_do_without_the_cache(folder: Path, tmp_path: Path) -> None:
    small = ("--steps", 4, "--budgets", 2, "--runtime", "eager", "--prompt", PROMPT, "--output", tmp_path / "a")
    assert run("shapes", *small, "--cache-size", "0").exit_code == 0
    assert not (folder / "programs").exists()
    assert cache_limit() == 8 * 10**9  # for that command alone
    assert run("shapes", *small).exit_code == 0
    assert len([*(folder / "programs").iterdir()]) == 1


def test_a_size_that_is_none_is_one_line() -> None:
    for arguments in (("shapes", "--cache-size", "much"), ("rebuild", "x", "--cache-size", "much")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "cache size 'much': expected a number of bytes" in result.output
