"""Tensors that a run keeps in files of its own, to be read instead of made a second time."""

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recache_compile.errors import ArtifactError
from recache_compile.support.files import writing


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors of the CPU as safetensors, whole or not at all.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with writing(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def read_tensors(file: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Args:
        file: is there.
        names: of tensors that it must hold.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); remove it, it is then made anew") from None
    if missing := [name for name in names if name not in tensors]:
        raise ArtifactError(f"{file}: damaged (no {', '.join(missing)}); remove it, it is then made anew")
    return tensors
