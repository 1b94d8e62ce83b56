"""Pictures of schedules and of training runs."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from recache_compile.errors import ArtifactError, ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Progress
from recache_compile.search.charts import (
    CACHED,
    RECOMPUTED,
    draw_schedules,
    draw_training,
    schedules_figure,
    training_figure,
)

FEW, MANY = Schedule((0, 4), 8), Schedule((0, 2, 5), 8)
SCHEDULES = {"uniform": {2: FEW, 3: MANY}, "gram": {2: Schedule((0, 7), 8)}}
TRAINING = [
    (8, Progress("race", 3, MANY, 0.5)),
    (12, Progress("climb", 3, Schedule((0, 2, 6), 8), 0.25)),
    (20, Progress("race", 2, FEW, 0.75)),
    (20, Progress("fit", 2, FEW, float("nan"))),
    (30, Progress("reinforce", 2, Schedule((0, 3), 8), 0.5, entropy=1.5)),
    (30, Progress("reinforce", 3, MANY, 0.4, entropy=2.5)),
]


def titles(figure) -> list[str]:  # type: ignore[no-untyped-def]
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_schedules_have_one_panel_a_budget_and_one_row_a_policy() -> None:
    figure = schedules_figure(SCHEDULES)
    assert titles(figure) == ["k = 2", "k = 3"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["uniform", "gram"]


def test_recompute_steps_are_dark_and_cached_ones_light() -> None:
    figure = schedules_figure(SCHEDULES)
    drawn = [[to_hex(bar.get_facecolor()) for bar in row] for axes in figure.axes for row in axes.containers]
    expected = ["10001000", "10000001", "10100100"]  # a policy without this budget has an empty row
    assert drawn == [[RECOMPUTED if bit == "1" else CACHED for bit in mask] for mask in expected]


def test_a_long_label_keeps_its_end() -> None:
    figure = schedules_figure({f"/a{'/b' * 40}/learned.json": {2: FEW}})
    (label,) = (label.get_text() for label in figure.axes[0].get_yticklabels())
    assert label.startswith("…")
    assert label.endswith("/learned.json")
    assert len(label) == 32


def test_training_has_stages_losses_entropies_and_one_image_a_budget() -> None:
    figure = training_figure(TRAINING)
    ribbon, losses, entropies = figure.axes[:3]
    assert [text.get_text() for text in ribbon.get_legend().get_texts()] == ["race", "climb", "fit", "reinforce"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines == {"k = 2": [[20, 0.75], [30, 0.5]], "k = 3": [[8, 0.5], [12, 0.25], [30, 0.4]]}
    assert losses.get_yscale() == "log"
    assert [line.get_ydata().tolist() for line in entropies.lines] == [[1.5], [2.5]]
    assert titles(figure) == ["k = 2", "k = 3"]


def test_an_image_shows_the_best_schedules_from_the_first_to_the_last() -> None:
    image = training_figure(TRAINING).axes[-1].collections[0]
    masks = ["".join(str(int(bit)) for bit in row) for row in np.asarray(image.get_array())]
    assert masks == ["10100100", "10100010", "10100100"]
    edges = image.get_coordinates()[:, 0, 1]
    assert edges[:3].tolist() == [8, 12, 30]
    assert edges[3] > 30


def test_a_stage_begins_where_the_one_before_ended() -> None:
    spans = training_figure(TRAINING).axes[0].patches
    begins = [span.get_x() for span in spans]
    assert begins == [0, 8, 12, 20, 20]


def test_without_entropies_there_is_no_panel_for_them() -> None:
    assert len(training_figure(TRAINING[:3]).axes) == len(training_figure(TRAINING).axes) - 1


@pytest.mark.parametrize("losses", [(0.5, -0.5), (0.5, 0.0), (float("nan"), float("nan"))])
def test_losses_that_are_not_all_positive_are_drawn_on_a_linear_scale(
    losses: tuple[float, float], tmp_path: Path
) -> None:
    progress = [(8 * number, Progress("climb", 2, FEW, loss)) for number, loss in enumerate(losses)]
    assert training_figure(progress).axes[1].get_yscale() == "linear"
    draw_training(progress, tmp_path / "training.png")


def test_many_budgets_take_several_rows_without_empty_frames() -> None:
    progress = [(budget, Progress("fit", budget, Schedule(tuple(range(budget)), 8), 1.0)) for budget in range(1, 7)]
    assert titles(training_figure(progress)) == [f"k = {budget}" for budget in range(1, 7)]
    assert len(training_figure(progress).axes) == 2 + 6


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    draw_schedules(SCHEDULES, tmp_path / "new" / "schedules.png")
    draw_training(TRAINING, tmp_path / "new" / "training.png")
    draw_training(TRAINING[:1], tmp_path / "new" / "short.png")
    for file in (tmp_path / "new").iterdir():
        with Image.open(file) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width > 900
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_nothing_to_draw_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="none to draw"):
        draw_schedules({"uniform": {}}, tmp_path / "schedules.png")
    with pytest.raises(ScheduleError, match="nothing was reported"):
        draw_training([], tmp_path / "training.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        draw_schedules(SCHEDULES, Path("/proc/nothing/schedules.png"))


def test_a_failure_leaves_the_picture_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def torn(self: Figure, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"\x89PNG half of it")
        raise MemoryError

    (tmp_path / "schedules.png").write_text("before")
    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(MemoryError):
        draw_schedules(SCHEDULES, tmp_path / "schedules.png")
    assert [file.name for file in tmp_path.iterdir()] == ["schedules.png"]
    assert (tmp_path / "schedules.png").read_text() == "before"
