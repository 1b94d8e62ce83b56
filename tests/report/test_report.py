"""The page: whole, self-contained, and used as a person would, in headless Chromium."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from recache_compile.evaluation.result import read_result
from recache_compile.evaluation.wording import plain
from recache_compile.report.contents import difference_map
from tests.cli.test_app import check_refused, run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OFFLINE = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECTIONS = ("pictures", "quality", "schedules", "redundancy", "time", "memory", "programs", "reproduce")
VOID = {"meta", "link", "img", "input", "br"}


class Outline(HTMLParser):
    """Elements by name, and whether every one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `bench`, as it is kept."""
    line = {"name": "eager", "loop": 2.0, "spread": [1.9, 2.1], "recompute_step": 0.1, "cached_step": None,
            "prepare_seconds": 1.0, "first_loop": 3.0, "ideal": 2.0, "graphs": 0, "graph_breaks": 0, "recompiles": 0,
            "held_bytes": 1, "peak_bytes": 5_000_000, "disk_bytes": None, "more": {}, "over_ideal": 1.0}  # fmt: skip
    lines = [line, {**line, "name": "recache-compile", "loop": 0.5, "cached_step": 0.001}]
    request = {"model": "flux-small", "budget": 5, "config": {"num_steps": 20, "runtime": "eager", "call": {}}}
    run = {"date": "2026-01-01", "machine": "a machine", "versions": {}, "request": request,
           "recompute_steps": [0, 5, 9, 13, 17], "rounds": 3, "lines": lines, "failed": {}, "best_peer": "-"}  # fmt: skip
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    file.write_text(json.dumps(run))
    return file


@pytest.fixture(scope="module")
def page(evaluated: Path, bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    result = run("report", evaluated, "--bench", bench, "--output", file)
    assert result.exit_code == 0, result.output
    assert str(file) in result.stdout
    return file


@pytest.fixture(scope="module")
def outline(page: Path) -> Outline:
    parser = Outline()
    parser.feed(page.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


def test_nothing_is_fetched(page: Path, outline: Outline) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.findall(r"https?://|@import|url\((?!#)", text)
    sources = [
        each.get("src") or each.get("href") or "" for tag in ("img", "script", "link") for each in outline.all(tag)
    ]
    assert all(source == "" or source.startswith("data:") for source in sources)


def test_every_section_is_there_and_linked(outline: Outline) -> None:
    sections = {each.get("id") for each in outline.all("section")}
    assert sections == {*SECTIONS, "field"}
    assert {(each.get("href") or "").removeprefix("#") for each in outline.all("a")} - {"content"} == sections


def test_every_picture_of_every_budget_is_there(outline: Outline, evaluated: Path) -> None:
    buttons = [each for each in outline.all("button") if "data-sample" in each]
    lines = {(line.policy, str(line.budget)) for line in read_result(evaluated).lines} | {("", "8")}
    assert {(each["data-policy"], each["data-budget"]) for each in buttons} == lines
    assert len(buttons) == 6 * len(lines)
    assert all(each["aria-label"] for each in buttons)


def test_names_of_the_drawings_are_unique(outline: Outline) -> None:
    names = [each["id"] for _, each in outline.found if "id" in each]
    assert len(names) == len(set(names))


def test_without_a_bench_there_is_no_table_of_peers(evaluated: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert run("report", evaluated, "--output", file).exit_code == 0
    assert 'id="field"' not in file.read_text(encoding="utf-8")


def test_captions_cannot_break_out_of_the_page(evaluated: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(evaluated, tmp_path / "evaluation"))
    setting = json.loads((own / "evaluation.json").read_text())
    setting["prompts"][0] = '"><script>alert(1)</script>'
    (own / "evaluation.json").write_text(json.dumps(setting))
    assert run("report", own, "--output", tmp_path / "page.html").exit_code == 0
    assert "<script>alert" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_is_no_evaluation_is_refused(tmp_path: Path, evaluated: Path) -> None:
    check_refused(
        run("report", tmp_path / "nothing", "--output", tmp_path / "a.html"), "evaluation.json: cannot be read"
    )
    own = Path(shutil.copytree(evaluated, tmp_path / "evaluation"))
    (own / "result.json").unlink()
    check_refused(run("report", own, "--output", tmp_path / "a.html"), "result.json: cannot be read")
    (own / "bench.json").write_text("{}")
    check_refused(
        run("report", evaluated, "--bench", own / "bench.json", "--output", tmp_path / "a.html"),
        "is no result of bench",
    )
    assert not (tmp_path / "a.html").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    paths = [path for name in BROWSERS if (path := shutil.which(name))]
    if not paths:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=paths[0], args=list(OFFLINE))
        yield opened
        opened.close()


def opened(browser: Any, page: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window of a width, and what its console complains about."""
    window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True).new_page()
    complaints: list[str] = []
    window.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.on(
        "request",
        lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    window.goto(page.as_uri())
    return window, complaints


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_it_fits_every_window(browser: Any, page: Path, width: int, scheme: str) -> None:
    window, complaints = opened(browser, page, width, scheme)
    assert window.evaluate("document.documentElement.scrollWidth") == width
    paper = window.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3]))
    assert brightness < 120 if scheme == "dark" else brightness > 700
    assert complaints == []


@pytest.mark.slow
def test_the_slider_moves_by_mouse_and_by_keyboard(browser: Any, page: Path) -> None:
    window, complaints = opened(browser, page, 900)
    stage, cut = window.locator(".stage"), window.locator("#cut")

    def edge() -> str:
        return str(window.evaluate("document.querySelector('.stage').style.getPropertyValue('--cut')"))

    box = stage.bounding_box()
    window.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    window.mouse.down()
    assert edge() == "25%"
    window.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60)
    window.mouse.up()
    assert edge() == "75%"
    window.mouse.move(box["x"] + 10, box["y"] + 60)
    assert edge() == "75%"
    cut.focus()
    window.keyboard.press("ArrowRight")
    assert edge() == "76%"
    window.keyboard.press("Home")
    assert edge() == "0%"
    assert complaints == []


@pytest.mark.slow
def test_everything_is_reached_by_keyboard(browser: Any, page: Path) -> None:
    window, complaints = opened(browser, page, 900)
    seen = set()
    for _ in range(80):
        window.keyboard.press("Tab")
        seen.add(
            window.evaluate(
                "[document.activeElement.tagName, document.activeElement.name, document.activeElement.id].join()"
            )
        )
    assert {"A,,", "BUTTON,,theme", "INPUT,policy,", "INPUT,budget,", "INPUT,view,", "INPUT,,cut"} <= seen
    window.locator("input[name=policy]").first.focus()
    window.keyboard.press("ArrowDown")
    assert "front-loaded, k = " in window.locator("#facts").inner_text()
    window.locator("input[name=budget][value='4']").evaluate("input => (input.click(), input.focus())")
    window.keyboard.press("ArrowUp")
    assert "k = 2" in window.locator("#facts").inner_text()
    assert window.locator(".tag.right").inner_text() == "k = 2"
    assert complaints == []


@pytest.mark.slow
def test_pictures_are_picked_from_the_sheet_and_compared(browser: Any, page: Path) -> None:
    window, complaints = opened(browser, page, 1600)
    cell = window.locator("button[data-sample='3'][data-policy='uniform'][data-budget='4']")
    cell.click()
    assert window.locator("#prompt").inner_text() == cell.get_attribute("data-prompt")
    assert cell.get_attribute("aria-pressed") == "true"
    over = window.locator(".stage .over")
    assert over.get_attribute("src") == cell.locator("img").last.get_attribute("src")
    window.get_by_text("difference × 4").click()
    assert over.get_attribute("src") == cell.get_attribute("data-difference")
    assert cell.locator("img").get_attribute("src") == cell.get_attribute("data-difference")
    assert not window.locator("#cut").is_visible()
    window.locator("label", has_text="slider").click()
    assert over.get_attribute("src") != cell.get_attribute("data-difference")
    shot = window.locator("button[data-sample='0'][data-policy=''] img")
    assert shot.is_visible()
    assert complaints == []


@pytest.mark.slow
def test_dark_and_light_are_switched_by_hand(browser: Any, page: Path) -> None:
    window, _ = opened(browser, page, 900)
    window.locator("#theme").click()
    assert window.evaluate("document.documentElement.dataset.theme") == "dark"
    window.locator("#theme").click()
    assert window.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_difference_map_shows_the_largest_difference_of_a_channel() -> None:
    one, other = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [
        [max(min(255, 4 * abs(int(one[c, y, x]) - int(other[c, y, x]))) for c in range(3)) for x in range(5)]
        for y in range(4)
    ]
    assert difference_map(one, other).tolist() == expected
    assert difference_map(one, one).max() == 0


def test_timelines_are_the_schedules(page: Path, evaluated: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in read_result(evaluated).lines:
        label = f"{line.policy}, k = {line.budget}: recomputed steps {', '.join(map(str, line.recompute_steps))}"
        drawing = text[text.index(label) :]
        drawing = drawing[: drawing.index("</svg>")]
        bars = [float(place) for place in re.findall(r'class="on" x="([\d.]+)"', drawing)]
        assert [int(place) for place in bars] == list(line.recompute_steps)


def test_the_heat_map_has_a_cell_for_every_change(page: Path, evaluated: Path) -> None:
    known = json.loads((evaluated / "profile.json").read_text())["redundancy"]["changes"]
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"<title>step (\d+): ([\d.]+)% changed</title>", text)
    expected = [(step, change) for row in known for step, change in enumerate(row) if change is not None]
    assert [(int(step), float(value)) for step, value in shown] == [
        (step, pytest.approx(100 * change, abs=0.006)) for step, change in expected
    ]


def test_the_table_has_the_numbers_of_the_result(page: Path, evaluated: Path) -> None:
    text = page.read_text(encoding="utf-8")
    table = text[text.index('aria-label="Table of quality and cost"') :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)[2:]
    cells = [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows
    ]
    for line, row in zip(read_result(evaluated).lines, cells, strict=True):
        assert row[:4] == [line.policy, str(line.budget), f"÷ {line.macs_reduction:.2f}", f"× {line.speedup:.2f}"]
        assert row[4] == line.target
        assert plain(line.values["psnr"]) in row
