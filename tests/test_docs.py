"""What the pages in docs/ show works as it is written, and what they link to exists."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.cli.app import main
from recache_compile.pipelines.load import load_pipeline
from recache_compile.policies import registry as policies
from recache_compile.runtimes import registry as runtimes
from tests.families import DIFFERENT, EXACT, STEPS, TINY, compile_tiny, error, plain
from tests.passes.tiny import Formula, show, simple
from tests.test_layout import MAY_IMPORT
from tests.tiny_pipelines import draw

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERY = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES)
FENCE = re.compile(r"(<!-- not run -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = ("extend", *(pytest.param(page, marks=pytest.mark.slow) for page in ("quick-start", "train-a-policy", "deploy")))
MADE_BY_SCRIPTS = ("benchmarks.md", "models.md", "pipelines.md", "plans.md", "schedules.md")


def python_of(page: str) -> list[str]:
    """The Python blocks of a page, without those that say they are not run."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return [code for skipped, language, code in FENCE.findall(text) if language == "python" and not skipped]


def execute(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "<docs>", "exec"), names)  # noqa: S102 - our own pages


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; what is registered in it is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    monkeypatch.setattr(
        runtimes, "RUNTIMES", runtimes.RUNTIMES | {"inductor": runtimes.RUNTIMES["eager"]}
    )  # for "auto"
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run_one_after_another(page: str, home: Path) -> None:
    blocks = python_of(page)
    if "shapes-recache" in "".join(blocks):
        rc.compile(load_pipeline("shapes"), budgets=(5, 10, 15), runtime="eager").save(home / "shapes-recache")
    names: dict[str, Any] = {"__name__": "docs"}
    with torch.enable_grad():
        for block in blocks:
            execute(block, names)


def test_the_pass_in_contributing_is_one() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = (code for _, language, code in FENCE.findall(text) if language == "python")
    names: dict[str, Any] = {"__name__": "docs"}
    execute(block, names)

    def scaled(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return (hidden * 1).sin()

    result = names["FoldScale"]()(simple(Formula(scaled)))
    assert result.modified and not names["FoldScale"]()(result.program).modified
    assert show(result.program).splitlines()[-2] == "sin = aten.sin.default(hidden_states)"


@pytest.mark.slow
def test_the_small_flux_is_what_its_engines_give(home: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers", minversion="5")
    names: dict[str, Any] = {}
    for block in python_of("compile-your-model"):
        execute(block, names)
    given = {**names["call"], "num_inference_steps": 8, "output_type": "latent", "latents": torch.randn(1, 64, 16)}
    from_pretrained = names["DiffusionPipeline"].from_pretrained
    drawn = {}
    for folder, full in (("flux", from_pretrained("tiny-flux")), ("flux-with-lora", names["pipe"])):
        ours = rc.accelerate(from_pretrained("tiny-flux", transformer=None), rc.load(folder), budget=8)
        drawn[folder] = full("a dog", **given).images
        assert error(ours("a dog", **given).images, drawn[folder]) <= EXACT
    assert error(drawn["flux-with-lora"], drawn["flux"]) >= DIFFERENT


def test_padded_text_serves_prompts_of_every_length() -> None:
    names: dict[str, Any] = {}
    execute(next(block for block in python_of("compile-your-model") if "def padded" in block), names)
    tiny = TINY["qwen-image"]
    long = tiny.call(0)
    short = {**long, **{name: long[name][:, :5] for name in ("prompt_embeds", "prompt_embeds_mask")}}
    compiled = compile_tiny(tiny, names["padded"](long, 9))
    assert len(compiled.variants) == 1
    pipeline = rc.accelerate(tiny.make(), compiled, budget=STEPS)
    for call in (long, short):
        assert error(draw(pipeline, names["padded"](call, 9), STEPS), plain(tiny, call)) <= EXACT


@pytest.mark.parametrize("file", EVERY, ids=lambda file: file.name)
def test_commands_are_written_as_the_command_line_takes_them(file: Path) -> None:
    shown = [code for _, language, code in FENCE.findall(file.read_text(encoding="utf-8")) if language == "sh"]
    lines = [line.rpartition("&&")[2] for code in shown for line in code.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line)
        if not words or Path(words[0]).name != "recache-compile":
            continue
        name, *rest = words[1:] if words[1] in main.commands else ["compile", *words[1:]]
        main.commands[name].make_context(name, rest)


@pytest.mark.parametrize("file", EVERY, ids=lambda file: file.name)
def test_links_and_pictures_lead_somewhere(file: Path) -> None:
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = file.parent / path if path else file
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", place.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_comparison_shows_the_numbers_that_were_measured(size: str) -> None:
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    shown = {row[0].removesuffix(", uncached"): row for row in rows if len(row) == 6}
    result = json.loads((ROOT / "benchmarks" / "results" / f"bench-flux-{size}.json").read_text(encoding="utf-8"))
    first = {"small": 1, "medium": 3}[size]
    for line in result["lines"]:
        row = shown[line["name"]]
        assert row[first : first + 2] == [f"× {line['speedup']:.2f}", f"{line['over_ideal']:.2f}"]
        assert row[5] == f"{line['graphs']} / {line['graph_breaks']} / {line['recompiles']}"
    measured = {line["name"] for line in result["lines"]}
    assert [name for name, row in shown.items() if row[first].startswith("×") and name not in measured] == []
    assert f"{result['times_faster']:.2f}" in text


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_pages_are_tidy(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"TODO|/root/|/tmp/|/work/", text)
    lines = [line for line in FENCE.sub("", text).splitlines() if not line.startswith(("|", "!["))]
    assert file.name in MADE_BY_SCRIPTS or max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "file", (ROOT / "docs" / "how-it-works.md", ROOT / "CONTRIBUTING.md"), ids=lambda file: file.name
)
def test_files_that_are_named_exist(file: Path) -> None:
    package = ROOT / "recache_compile"
    named = set(re.findall(r"(?<![\w/*])\w+/[\w/]+\.py\b", file.read_text(encoding="utf-8")))
    assert named
    assert [name for name in sorted(named) if not ((ROOT / name).exists() or (package / name).exists())] == []


def test_the_picture_of_folders_is_the_table_that_is_held() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    picture = next(code for _, _, code in FENCE.findall(text) if code.startswith("cli "))
    one_line_each = re.sub(r"\n +(?=\w)", " ", picture).splitlines()
    shown = {line.split()[0]: set(line.partition("→")[2].split()) for line in one_line_each}
    for_all = {"errors", "support", "_version"}
    assert shown == {part: set(seen.split()) - for_all for part, seen in MAY_IMPORT.items() if part not in for_all}
    order = list(shown)
    assert all(order.index(part) < order.index(other) for part, seen in shown.items() for other in seen)
