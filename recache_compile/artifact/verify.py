"""Are the files of an artifact those that were written?  Their hashes decide.

Hashing 24 GB takes a minute, so that a server need not do it at every start: with "once" it is
remembered in the user's cache, outside of the artifact, which files were found whole: by size,
times of change and place on the disk.  A file that was replaced or written to since is hashed
again.  Somebody who can write to the artifact *and* set such times can get past "once"; where
that matters, ask for "always".
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from recache_compile.errors import ArtifactError
from recache_compile.support.files import private_folder, writing

Verify = Literal["always", "once"]

BESIDE = ("README.md", ".gitattributes")
"""Files that the Hub puts beside those of an artifact."""

HUB_NOTES = (".cache", "huggingface")
"""Folder in which a download from the Hub keeps notes of its own."""

SETTLED_SECONDS = 2.0
"""Files that changed so recently may change again within one tick of the file system's clock."""


def files_in(folder: Path, all_of_them: bool = False) -> set[str]:
    """Names of all that is not a folder, relative to `folder`; without what the Hub adds, unless all are asked for."""
    found = [file.relative_to(folder) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    if all_of_them:
        return {str(file) for file in found}
    return {str(file) for file in found if str(file) not in BESIDE and file.parts[:2] != HUB_NOTES}


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise `ArtifactError` for a link, unless it is one of the Hub's cache: into `blobs`, beside `snapshots`."""
    for name in names:
        file = folder / name
        if file.is_symlink() and file.resolve().parent != (folder.resolve().parent.parent / "blobs"):
            raise ArtifactError(
                f"{file}: is a link, artifacts hold plain files; copy what it leads to, or download with"
                " `hf download ... --local-dir FOLDER`"
            )


def check_files(
    folder: Path, manifest: Path, expected: Mapping[str, str], spared: Collection[str], verify: Verify
) -> None:
    """Raise `ArtifactError` unless every file is there and unchanged, and there is no other.

    Args:
        folder: of the artifact.
        manifest: its manifest.
        expected: hash of every other file, by its place in the folder.
        spared: files that need not be whole.
        verify: "always": hash all of them; "once": only those that changed since they were hashed.
    """
    present = files_in(folder) - {manifest.name}
    names = [name for name in expected if name not in spared]
    if missing := next((name for name in names if name not in present), None):
        raise ArtifactError(f"{folder}: {missing} is missing from the artifact; compile again")
    check_links(folder, names)
    if verify not in get_args(Verify):
        raise ArtifactError(f"verify {verify!r} is unknown; choose {' or '.join(map(repr, get_args(Verify)))}")
    known = _Known.read(folder) if verify == "once" else _Known(folder, {})
    for name in names:
        if not known.holds(name, expected[name]) and not known.finds(name, expected[name]):
            raise ArtifactError(f"{folder / name}: damaged (its hash differs from the manifest's); compile again")
    if extra := sorted(present - set(expected)):
        raise ArtifactError(f"{folder / extra[0]}: not part of the artifact; remove it or compile again")
    if verify == "once":
        known.write()


def hash_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


class _Known:
    """Which files of a folder were found whole, kept in the user's cache."""

    def __init__(self, folder: Path, facts: Mapping[str, object]) -> None:
        self._folder, self._facts, self._found = folder.resolve(), facts, dict(facts)

    @classmethod
    def read(cls, folder: Path) -> "_Known":
        """What is known of a folder; nothing where the note cannot be read."""
        try:
            facts = json.loads(_note(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError, ArtifactError):
            facts = {}
        return cls(folder, facts if isinstance(facts, dict) else {})

    def holds(self, name: str, expected: str) -> bool:
        """Whether a file had this hash when it was last looked at, and has not changed since."""
        now = self._facts_of(name, expected)
        return now is not None and self._facts.get(name) == now

    def finds(self, name: str, expected: str) -> bool:
        """Whether a file has this hash; remembered as it was before, in case it changes while it is hashed."""
        before = self._facts_of(name, expected)
        is_whole = hash_of(self._folder / name) == expected
        self._found.pop(name, None)
        if is_whole and before is not None:
            self._found[name] = before
        return is_whole

    def write(self) -> None:
        """Remember what was found; a cache that cannot be written to is done without."""
        if self._found == self._facts:
            return
        try:
            with writing(_note(self._folder)) as partial:
                partial.write_text(json.dumps(self._found), encoding="utf-8")
        except ArtifactError:
            return

    def _facts_of(self, name: str, expected: str) -> list[object] | None:
        """What tells that a file is still the one that was hashed; None where it is too new to tell."""
        found = (self._folder / name).stat()
        if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED_SECONDS:
            return None
        return [expected, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _note(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return private_folder("verified") / f"{name}.json"
