"""Where output goes: checked before the work begins, replaced only by something whole."""

import contextlib
import functools
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from recache_compile.errors import ArtifactError


@contextlib.contextmanager
def output_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what the file system refuses into one clear line that asks for another file or folder."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"output {path}: cannot be written ({error.strerror}); name another {kind}") from None


def check_place(path: Path) -> None:
    """Raise `OSError` unless something new can be written where `path` is to be; nothing is left behind."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    with tempfile.TemporaryFile(dir=place):
        pass


def check_file(file: Path) -> None:
    """Raise `ArtifactError` unless a file can be written at `file`; nothing is left behind."""
    with output_errors(file, "file"):
        if file.exists() and not file.is_file():
            raise ArtifactError(f"output {file}: is there already and is no regular file; name another file")
        check_place(file)


@contextlib.contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A file that takes the place of `file` once the block has succeeded.

    Raises:
        ArtifactError: it cannot be written.
    """
    check_file(file)
    partial = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")  # others may write it too
    try:
        with output_errors(file, "file"):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.chmod(0o644)  # some libraries write for the owner alone
            partial.replace(file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where the package keeps what it can make again: `RECACHE_CACHE`, else a folder in the user's cache."""
    own = os.environ.get("RECACHE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recache-compile"


def private_folder(name: str) -> Path:
    """A folder of the cache that only this user can write to, made where it is missing: what lies there may be code.

    Those who can do without the cache catch the error; that others may write to it is also warned of, once.

    Raises:
        ArtifactError: others may write to it, or it cannot be made.
    """
    folder = cache_folder() / name
    for each in (folder.parent, folder):
        with output_errors(each, "folder, with RECACHE_CACHE"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = each.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            message = f"{each}: others may write to this cache; chmod -R go-w {folder.parent}, or set RECACHE_CACHE"
            _warn_once(message)
            raise ArtifactError(message)
    return folder


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"the cache is not used: {message}", stacklevel=3)
