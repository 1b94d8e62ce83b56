"""The house: its rooms, who may see whom, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import recache_compile as rc

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "runtimes", "policies")
CORE = (
    *("compiler", "compiled", "artifact", "api", "adapters", "loading", "recording", "stand_in", "planning", "specs"),
    *("measure", "picture", "inspection", "parameters", "cli"),
    *("charts", "schedules"),
    *("quality", "pretrained"),
    *("choosing", "training", "training_view", "study", "objective", "rollout", "calibration", "prompts"),
    *("workers", "bench", "evaluation", "report", "commands"),
)


def imports_of(file: Path) -> set[str]:
    """Dotted names that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sees(file: Path, *modules: str) -> list[str]:
    return [
        name for name in imports_of(file) if any(name == module or name.startswith(f"{module}.") for module in modules)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_real_flat_folders_with_a_link(room: str) -> None:
    assert not (ROOT / room).is_symlink()
    assert not [entry for entry in (ROOT / room).iterdir() if entry.is_dir() and entry.name != "__pycache__"]
    link = ROOT / "recache_compile" / room
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{room}"


def test_top_level_entries_are_those_of_the_design() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    visible = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    assert visible <= {
        *ROOMS, "recache_compile", "tests", "docs", "benchmarks",
        "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE",
    }  # fmt: skip


@pytest.mark.parametrize("file", sorted((ROOT / "passes").glob("*.py")), ids=lambda file: file.name)
def test_passes_see_facts_only(file: Path) -> None:
    above = [f"recache_compile.{name}" for name in (*CORE, "runtimes", "policies", "models")]
    assert not sees(file, *above)


@pytest.mark.parametrize("file", sorted((ROOT / "policies").glob("*.py")), ids=lambda file: file.name)
def test_policies_see_no_graphs(file: Path) -> None:
    above = [f"recache_compile.{name}" for name in (*CORE, "runtimes", "passes", "models")]
    assert not sees(file, "torch.fx", *above)


@pytest.mark.parametrize("file", sorted((ROOT / "runtimes").glob("*.py")), ids=lambda file: file.name)
def test_runtimes_see_no_compiler(file: Path) -> None:
    above = [f"recache_compile.{name}" for name in (*CORE, "policies", "models")]
    assert not sees(file, *above)


def test_what_stands_above_the_rooms_exists() -> None:
    places = [ROOT / "recache_compile" / name for name in CORE]
    assert all(place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() for place in places)


def test_nothing_imports_the_command_line() -> None:
    files = [file for folder in (*ROOMS, "recache_compile") for file in (ROOT / folder).rglob("*.py")]
    assert not [file for file in files if sees(file, "recache_compile.cli.app")]


def test_public_names() -> None:
    assert sorted(rc.__all__) == [
        "Compiled",
        "RecacheError",
        "Schedule",
        "__version__",
        "accelerate",
        "compile",
        "load",
        "rebuild",
    ]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {name for name in tracked if name.startswith("recache_compile/")} - {
        f"recache_compile/{room}" for room in ROOMS
    }
    expected |= {f"recache_compile/{name}" for name in tracked if name.partition("/")[0] in ROOMS}
    assert names == expected
