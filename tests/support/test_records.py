"""A folder's own record says what work it belongs to."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from recache_compile.errors import ArtifactError
from recache_compile.support.records import check_folder


@dataclass(frozen=True, slots=True)
class Inner:
    steps: int
    call: dict[str, int]


@dataclass(frozen=True, slots=True)
class Outer:
    config: Inner
    seed: int


def test_another_choice_is_named_wherever_it_is(tmp_path: Path) -> None:
    record = Outer(Inner(8, {"scale": 2}), 0)
    assert check_folder(record, record, tmp_path, "a study")
    assert not check_folder(record, None, tmp_path, "a study")
    other = replace(record, config=Inner(9, {"scale": 3}), seed=1)
    with pytest.raises(ArtifactError, match="holds a study with another steps and call and seed; name another folder"):
        check_folder(other, record, tmp_path, "a study")
    assert check_folder(other, record, tmp_path, "a study", free=("steps", "call", "seed"))
