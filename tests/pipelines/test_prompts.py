"""Captions for training: from a file, or of our own."""

from pathlib import Path

import pytest

from recache_compile.errors import ModelError
from recache_compile.models.shapes.scenes import parse_caption
from recache_compile.pipelines.prompts import GENERAL, training_and_held_out


def written(folder: Path, *lines: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_shapes_has_captions_that_it_can_draw() -> None:
    training, held_out = training_and_held_out("shapes", None)
    assert len(training) == pytest.approx(len(held_out), abs=1) == pytest.approx(1000, rel=0.1)
    assert len({*training, *held_out}) == len(training) + len(held_out)
    for caption in (*training[:50], *held_out[:50]):
        assert parse_caption(caption).caption() == caption


def test_captions_are_the_same_every_time() -> None:
    assert training_and_held_out("shapes", None) == training_and_held_out("shapes", None)


def test_other_models_have_captions_of_many_kinds() -> None:
    training, held_out = training_and_held_out("some/model", None)
    assert {*training, *held_out} == set(GENERAL)
    assert (len(training), len(held_out)) == (18, 6)


@pytest.mark.parametrize("model", ["shapes", "some/model"])
def test_every_fourth_caption_of_a_file_is_held_out(model: str, tmp_path: Path) -> None:
    file = written(tmp_path, *(f"caption {number}" for number in range(9)))
    training, held_out = training_and_held_out(model, file)
    assert training == tuple(f"caption {number}" for number in (0, 1, 2, 4, 5, 6, 8))
    assert held_out == ("caption 3", "caption 7")


def test_empty_lines_and_repeated_captions_do_not_count(tmp_path: Path) -> None:
    file = written(tmp_path, "", "  a cat ", "a dog", "", "a cat", "ein Fuß", "\t", "a dog", "a fox", "")
    assert training_and_held_out("some/model", file) == (("a cat", "a dog", "ein Fuß"), ("a fox",))


def test_two_captions_are_enough(tmp_path: Path) -> None:
    assert training_and_held_out("some/model", written(tmp_path, "one", "two")) == (("one",), ("two",))


def test_a_mark_of_the_byte_order_is_no_part_of_a_caption(tmp_path: Path) -> None:
    assert training_and_held_out("shapes", written(tmp_path, "\ufeffone", "two"))[0] == ("one",)


@pytest.mark.parametrize("lines", [(), ("", " "), ("a cat",), ("a cat", "a cat")])
def test_fewer_captions_are_refused(lines: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"prompts\.txt: [01] captions; give at least two, one a line"):
        training_and_held_out("shapes", written(tmp_path, *lines))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    for file in (tmp_path / "nothing.txt", tmp_path / "picture.png", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ModelError, match=r"cannot be read \(.*\); give a text file, one caption a line"):
            training_and_held_out("shapes", file)
