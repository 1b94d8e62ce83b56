"""Files of an artifact are hashed, and with "once" not again until they change."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from recache_compile.artifact import verify
from recache_compile.artifact.verify import Verify, check_files
from recache_compile.errors import ArtifactError

SETTLED = 10.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an artifact with one file, and a cache that is empty at first."""
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "weights").write_bytes(b"whole")
    return tmp_path / "artifact"


def check(folder: Path, how: Verify) -> None:
    expected = {"weights": "sha256:" + hashlib.sha256(b"whole").hexdigest()}
    check_files(folder, folder / "manifest.json", expected, (), how)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    hash_of = verify.hash_of

    def counting(file: Path) -> str:
        names.append(file.name)
        return hash_of(file)

    monkeypatch.setattr(verify, "hash_of", counting)
    return names


@pytest.mark.parametrize("how", ["once", "always"])
def test_files_that_have_just_been_written_are_hashed(folder: Path, how: Verify, hashed: list[str]) -> None:
    for _ in range(2):
        check(folder, how)
    assert hashed == ["weights", "weights"]
    (folder / "weights").write_bytes(b"hole")
    with pytest.raises(ArtifactError, match="weights: damaged"):
        check(folder, how)


def test_files_that_have_settled_are_hashed_once(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time() + SETTLED
    monkeypatch.setattr(verify.time, "time", lambda: now)
    for _ in range(3):
        check(folder, "once")
    assert hashed == ["weights"]
    check(folder, "always")
    assert hashed == ["weights", "weights"]
    before = (folder / "weights").stat()
    (folder / "weights").write_bytes(b"WHOLE")
    os.utime(folder / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="weights: damaged"):
        check(folder, "once")
