"""Artifacts on the Hugging Face Hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from recache_compile.errors import ArtifactError, importing, reason_of

if TYPE_CHECKING:
    from recache_compile.compiler.compiled import Compiled


def local_folder(folder: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or where the Hub's cache has the repository of this name, downloaded if need be.

    Raises:
        ArtifactError: it is neither, or cannot be downloaded.
    """
    if isinstance(folder, Path) or Path(folder).exists() or folder.count("/") != 1:
        if revision is not None:
            raise ArtifactError(f"{folder}: a folder has no revision {revision}; leave it out")
        return Path(folder)
    with importing(f"artifact {folder}", "pip install huggingface_hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(folder, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{folder}: no such folder, and no Hub repository that can be had here: {reason_of(error)}"
        ) from error


def push_to_hub(
    compiled: "Compiled", repository: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Upload an artifact.

    Args:
        compiled: what is uploaded.
        repository: "NAME/REPOSITORY"; made where there is none.
        private: whether a new repository is.
        revision: branch to commit to; None: the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: the Hub refuses.
    """
    with importing("push_to_hub", "pip install huggingface_hub"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    with tempfile.TemporaryDirectory(prefix="recache-") as place:
        folder = Path(place, "artifact")
        compiled.save(folder)
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Engines of {compiled.description.model}, budgets {list(compiled.plans)}",
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ArtifactError(f"push to {repository}: {reason_of(error)}; log in with `hf auth login`") from error
    return str(commit)
