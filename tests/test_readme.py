"""What the README shows works as it is written."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recache_compile.cli.app import main
from recache_compile.pipelines.load import load_pipeline
from recache_compile.runtimes.registry import RUNTIMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_commands_run_in_the_order_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.rpartition("&&")[2].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if shlex.split(line)[0].endswith("recache-compile")]
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output


def test_one_line_switches_a_pipeline_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path))
    monkeypatch.setitem(RUNTIMES, "inductor", RUNTIMES["eager"])  # what "auto" takes first
    (block,) = blocks("python")
    names: dict[str, Any] = {"pipe": load_pipeline("shapes")}
    exec(compile(block, "<README>", "exec"), names)  # noqa: S102 - our own page
    assert list((tmp_path / "programs").iterdir())
    assert names["image"].size == (32, 32)


def test_local_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
