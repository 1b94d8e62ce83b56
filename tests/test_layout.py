"""The folders, who may import whom, and what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import recache_compile as rc

ROOT = Path(__file__).parent.parent
PACKAGE = "recache_compile"
ROOT_FOLDERS = ("passes", "runtimes", "policies")

MAY_IMPORT = {
    "_version": "",
    "errors": "",
    "support": "_version errors",
    "models": "errors",
    "ir": "errors",
    "config": "errors ir",
    "capture": "errors ir",
    "passes": "errors ir capture",
    "policies": "errors support ir",
    "runtimes": "errors support ir capture passes",
    "compiler": "errors support ir config capture passes policies runtimes",
    "artifact": "_version errors support ir config capture policies runtimes compiler",
    "pipelines": "errors support models ir config capture policies runtimes compiler artifact",
    "judges": "errors models",
    "search": "_version errors support models ir config policies runtimes compiler artifact pipelines judges",
    "evaluation": "errors support models ir config policies runtimes compiler artifact pipelines judges search",
    "api": "errors ir config runtimes compiler artifact pipelines search",
    "package": "_version errors ir config compiler artifact pipelines api",
    "bench": "errors support ir config runtimes compiler artifact pipelines evaluation package",
    "report": "errors support models ir artifact evaluation bench",
    "scripts": "models ir config policies pipelines search",
    "cli": "_version errors support ir config runtimes artifact pipelines search evaluation api bench report",
}
"""What each part of the package imports, from the bottom to the top: a part sees only parts above it in this table.

A part is a folder or a module at the package's root, but for those of `PARTS`; "package" is its public face.
"""

PARTS = {
    "judges": ("evaluation.distances", "evaluation.judges", "evaluation.pretrained", "evaluation.rewards"),
    "scripts": ("models.shapes.evaluate", "models.shapes.train", "models.shapes.train_policies"),
}
"""Modules that stand elsewhere in the order than the others of their folder."""

WHEN_CALLED = {
    "save": "artifact.store",
    "push_to_hub": "artifact.hub",
    "__reduce__": "artifact.pickling",
}
"""Methods of `Compiled`, and what they import of what stands above it when they are called."""


@cache
def modules() -> dict[str, Path]:
    """Files of the package by their dotted names within it; "" is its public face."""
    files = [file for folder in ROOT_FOLDERS for file in (ROOT / folder).glob("*.py")]
    files = [file.relative_to(ROOT) for file in files] + [
        file.relative_to(ROOT / PACKAGE) for file in (ROOT / PACKAGE).rglob("*.py")
    ]
    named = {}
    for file in files:
        name = ".".join(file.with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        named[name] = ROOT / PACKAGE / file
    return named


def imports_in(tree: ast.AST) -> set[str]:
    """Modules of the package that are imported, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name.removeprefix(f"{PACKAGE}.") for name in whole} & set(modules())
            names |= {f"{PACKAGE}.{name}" for name in inside} or {node.module}
    own = {name.removeprefix(PACKAGE).removeprefix(".") for name in names if name.partition(".")[0] == PACKAGE}
    assert own <= set(modules())
    return own


@cache
def imports_of(name: str) -> frozenset[str]:
    """Modules that a module imports, but for those of `WHEN_CALLED`."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    found = imports_in(tree)
    return frozenset(found - set(WHEN_CALLED.values()) if name == "compiler.compiled" else found)


def part_of(name: str) -> str:
    """The row of the table that a module belongs to."""
    own = [part for part, members in PARTS.items() if name in members]
    return own[0] if own else name.partition(".")[0] or "package"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_what_the_table_allows_and_nothing_else(part: str) -> None:
    found = {
        other: (name, module)
        for name in modules()
        if part_of(name) == part
        for module in imports_of(name)
        if (other := part_of(module)) != part
    }
    forbidden = [pair for other, pair in found.items() if other not in MAY_IMPORT[part].split()]
    assert not forbidden
    assert set(found) == set(MAY_IMPORT[part].split()), "the table allows more than is used"


def test_the_table_is_in_order_and_complete() -> None:
    assert {part_of(name) for name in modules()} == set(MAY_IMPORT)
    assert {name for members in PARTS.values() for name in members} <= set(modules())
    above: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above
        above.add(part)


def test_no_file_imports_itself_through_others() -> None:
    try:
        TopologicalSorter({name: imports_of(name) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_what_a_compiled_model_imports_when_called_is_in_these_methods() -> None:
    tree = ast.parse(modules()["compiler.compiled"].read_text(encoding="utf-8"))
    inside = {
        function.name: imports_in(function) & set(WHEN_CALLED.values())
        for kind in tree.body
        if isinstance(kind, ast.ClassDef) and kind.name == "Compiled"
        for function in kind.body
        if isinstance(function, ast.FunctionDef)
    }
    assert {name: found for name, found in inside.items() if found} == {
        name: {module} for name, module in WHEN_CALLED.items()
    }
    elsewhere = [
        name
        for node in tree.body
        if not (isinstance(node, ast.ClassDef) and node.name == "Compiled")
        for name in imports_in(node)
    ]
    assert not set(elsewhere) & set(WHEN_CALLED.values())


def test_private_names_stand_in_one_place() -> None:
    """But for files below it, and those of which each has a library's inside to itself."""
    private = re.compile(
        r"\btorch(?:\.(?!utils\._pytree)\w+)*\._[a-z]\w*|\b_(?:hf_hook|diffusers_hook|orig_mod)\b|\w\._schema\b"
    )
    found = {
        name: sorted(set(private.findall(code)))
        for name, file in modules().items()
        if private.search(code := file.read_text(encoding="utf-8")) and name != "capture.compat"
    }
    assert found == {
        "bench.process": ["torch._dynamo"],
        "capture.export": ["torch._export"],  # the name of a logger
        "ir.cost": ["torch._subclasses"],
        "ir.serialize": ["torch._ops"],
        "runtimes.inductor": ["torch._inductor"],
    }


def test_the_package_s_root_is_small() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 6


@pytest.mark.parametrize("file", sorted((ROOT / "policies").glob("*.py")), ids=lambda file: file.name)
def test_policies_see_no_graphs(file: Path) -> None:
    assert "torch.fx" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ROOT_FOLDERS)
def test_folders_at_the_root_are_real_flat_folders_with_a_link(folder: str) -> None:
    assert not (ROOT / folder).is_symlink()
    assert not [entry for entry in (ROOT / folder).iterdir() if entry.is_dir() and entry.name != "__pycache__"]
    link = ROOT / "recache_compile" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"


def test_top_level_entries_are_those_of_the_design() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    visible = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    assert visible <= {
        *ROOT_FOLDERS, "recache_compile", "tests", "docs", "benchmarks",
        "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE",
    }  # fmt: skip


def test_public_names() -> None:
    assert sorted(rc.__all__) == [
        "CompileConfig",
        "Compiled",
        "Engines",
        "RecacheError",
        "Schedule",
        "__version__",
        "accelerate",
        "build_engines",
        "compile",
        "inspect",
        "load",
        "plan",
        "rebuild",
        "restore",
    ]
    assert all(hasattr(rc, name) for name in rc.__all__)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {name for name in tracked if name.startswith("recache_compile/")} - {
        f"recache_compile/{folder}" for folder in ROOT_FOLDERS
    }
    expected |= {f"recache_compile/{name}" for name in tracked if name.partition("/")[0] in ROOT_FOLDERS}
    assert names == expected
