"""Tensors in files of their own."""

from pathlib import Path

import pytest
import torch

from recache_compile.errors import ArtifactError
from recache_compile.support.tensors import read_tensors, write_tensors


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    given = {"a": torch.randn(3, 4).T, "b": torch.arange(3).byte()}
    write_tensors(given, tmp_path / "folder" / "x.safetensors")
    found = read_tensors(tmp_path / "folder" / "x.safetensors", ("a",))
    assert set(found) == {"a", "b"}
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors({"a": torch.zeros(8)}, file)
    with pytest.raises(ArtifactError, match=r"x\.safetensors: damaged \(no b, c\); remove it, it is then made anew"):
        read_tensors(file, ("a", "b", "c"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"x\.safetensors: damaged \(.+\); remove it, it is then made anew"):
        read_tensors(file)
