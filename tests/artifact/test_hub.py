"""Artifacts by their Hub id, and the Hub's cache, which is a folder of links; nothing goes over the network here."""

import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

import recache_compile as rc
from recache_compile.errors import ArtifactError

HUB_ID = "somebody/engines"


@pytest.fixture
def snapshot(eager_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact as the Hub's cache holds it: links to blobs, with what the Hub adds; its id leads there."""
    folder, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    for file in sorted(eager_artifact.rglob("*")):
        if file.is_file():
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            link = folder / file.relative_to(eager_artifact)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    for name in ("README.md", ".gitattributes"):
        (folder / name).write_text("of the Hub")

    def download(repository: str, revision: str | None = None) -> str:
        if repository != HUB_ID:
            raise HFValidationError(f"no {repository} at {revision}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_a_snapshot_is_loaded_by_its_folder_and_by_its_id(snapshot: Path, eager: rc.Compiled) -> None:
    for place in (snapshot, HUB_ID):
        assert rc.load(place).schedules == eager.schedules
    assert rc.inspect(HUB_ID).description == eager.description


def test_links_to_elsewhere_are_refused(snapshot: Path, tmp_path: Path) -> None:
    weights = next(file for file in snapshot.rglob("*.safetensors"))
    shutil.copy(weights.resolve(), tmp_path / "elsewhere")
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link, artifacts hold plain files; copy what it leads to, or"):
        rc.load(snapshot)


def test_what_is_neither_a_folder_nor_a_repository_is_told_in_one_line(snapshot: Path) -> None:
    with pytest.raises(ArtifactError, match="other/engines: no such folder, and no Hub repository that can be had"):
        rc.load("other/engines")
    with pytest.raises(ArtifactError, match="a folder has no revision main; leave it out"):
        rc.load(snapshot, revision="main")


def test_what_is_pushed_can_be_loaded(eager: rc.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            made[repository] = options

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            assert repo_id in made
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert eager.push_to_hub(HUB_ID, private=True) == "commit"
    assert made == {HUB_ID: {"private": True, "exist_ok": True}}
    assert rc.load(tmp_path / "uploaded").schedules == eager.schedules


def test_a_refused_push_says_what_to_do(eager: rc.Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise HFValidationError("no such name")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ArtifactError, match="push to a/b/c: no such name; log in with `hf auth login`"):
        eager.push_to_hub("a/b/c")


def test_a_pickle_of_a_folder_that_is_another_artifact_now_is_refused(eager_artifact: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(eager_artifact, tmp_path / "artifact"))
    loaded = rc.load(mine)
    kept = pickle.dumps(loaded)
    loaded.engines.uncached().save(tmp_path / "other")
    shutil.rmtree(mine)
    (tmp_path / "other").rename(mine)
    with pytest.raises(ArtifactError, match="is another artifact than the one that was pickled; load it instead"):
        pickle.loads(kept)  # our own
