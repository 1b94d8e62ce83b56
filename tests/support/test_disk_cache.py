"""The cache on disk: whole entries only, bounded, never trusted where others may write."""

import hashlib
import os
import threading
import warnings
from pathlib import Path

import pytest

from recache_compile.errors import ArtifactError
from recache_compile.support import disk_cache
from recache_compile.support.disk_cache import (
    bytes_of,
    cache_limit,
    clear_cache,
    keep_entry,
    limited_to,
    parts_of_cache,
    read_entry,
)

PARTS = (b"one", b"", b"\n{three}\n")


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RECACHE_CACHE_SIZE", raising=False)
    return tmp_path / "cache" / "programs"


def test_what_was_kept_is_read() -> None:
    assert read_entry("key") is None
    keep_entry("key", PARTS)
    assert read_entry("key") == PARTS
    keep_entry("key", (b"other",))
    assert read_entry("key") == (b"other",)


@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_a_damaged_entry_is_none(size: int, programs: Path) -> None:
    keep_entry("key", PARTS)
    whole = (programs / "key").read_bytes()
    (programs / "key").write_bytes(whole[:size])
    assert read_entry("key") is None
    (programs / "key").write_bytes(whole[:-1] + b"!")
    assert read_entry("key") is None


def test_an_entry_with_altered_sizes_is_none(programs: Path) -> None:
    keep_entry("key", PARTS)
    whole = (programs / "key").read_bytes()
    (programs / "key").write_bytes(whole.replace(b"[3, 0, 9]", b"[2, 1, 9]"))
    assert read_entry("key") is None


@pytest.mark.parametrize("sizes", [b"", b"3", b"{}", b'["3"]', b"[null]", b"[1.5, 1.5]", b"[-1, 4]", b"[2]", b"[4]"])
def test_sizes_that_do_not_fit_are_none(sizes: bytes, programs: Path) -> None:
    keep_entry("key", (b"abc",))
    text = sizes + b"\nabc"
    (programs / "key").write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert read_entry("key") is None


@pytest.mark.parametrize("folder", [".", ".."])
def test_what_others_may_write_to_is_neither_read_nor_written(folder: str, programs: Path) -> None:
    keep_entry("key", PARTS)
    (programs / folder).resolve().chmod(0o777)
    assert read_entry("key") is None
    keep_entry("other", PARTS)
    assert {file.name for file in programs.iterdir()} == {"key"}


def test_a_cache_that_others_may_write_to_is_warned_of_once(programs: Path) -> None:
    keep_entry("key", PARTS)
    programs.parent.chmod(0o775)
    with pytest.warns(UserWarning, match=f"cache is not used: .*chmod -R go-w {programs.parent}, or set RECACHE_CACHE"):
        read_entry("key")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_entry("key")


def test_what_somebody_else_owns_is_not_read(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_entry("key", PARTS)
    monkeypatch.setattr(os, "getuid", lambda: programs.stat().st_uid + 1)
    assert read_entry("key") is None


def test_folders_of_the_cache_are_the_user_s_own(programs: Path) -> None:
    mask = os.umask(0o000)
    try:
        keep_entry("key", PARTS)
    finally:
        os.umask(mask)
    assert [each.stat().st_mode & 0o077 for each in (programs, programs.parent)] == [0, 0]
    assert read_entry("key") == PARTS


def test_the_longest_unused_go_first(programs: Path) -> None:
    with limited_to(1000):
        for number, key in enumerate("abc"):
            keep_entry(key, (bytes(200),))
            os.utime(programs / key, (number, number))
        assert read_entry("a") is not None  # used just now
        keep_entry("d", (bytes(200),))
    assert {file.name for file in programs.iterdir()} == {"a", "c", "d"}


def test_what_is_larger_than_the_cache_is_not_kept(programs: Path) -> None:
    with limited_to(100):
        keep_entry("key", (bytes(200),))
        assert read_entry("key") is None


def test_a_cache_of_size_zero_is_neither_read_nor_written(programs: Path) -> None:
    keep_entry("key", PARTS)
    with limited_to(0):
        assert read_entry("key") is None
        keep_entry("other", PARTS)
    assert {file.name for file in programs.iterdir()} == {"key"}


def test_several_may_write_and_read_at_the_same_time() -> None:
    kinds = [tuple(bytes([number]) * 10_000 for _ in range(3)) for number in range(4)]
    seen: list[tuple[bytes, ...] | None] = []

    def work(own: tuple[bytes, ...]) -> None:
        for _ in range(20):
            keep_entry("key", own)
            seen.append(read_entry("key"))

    threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    assert set(seen) <= set(kinds)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("8GB", 8 * 10**9), ("1.5 gb", 1_500_000_000), ("500M", 500_000_000), ("7B", 7)]
)
def test_sizes_are_read(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_of(text) == size
    monkeypatch.setenv("RECACHE_CACHE_SIZE", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "8 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="expected a number of bytes, such as 8GB"):
        bytes_of(text)


def test_clearing_leaves_what_is_not_the_cache_s(programs: Path) -> None:
    keep_entry("key", PARTS)
    (programs.parent / "schedules").mkdir()
    (programs.parent / "schedules" / "a.json").write_text("[0]")
    (programs.parent / "mine").mkdir()
    (programs.parent / "mine" / "notes").write_text("")
    assert [(part.name, part.entries) for part in parts_of_cache()] == [("programs", 1), ("schedules", 1)]
    clear_cache()
    assert parts_of_cache() == ()
    assert [each.name for each in programs.parent.iterdir()] == ["mine"]
    assert set(disk_cache.PARTS) == {"programs", "schedules", "verified", "engines"}
