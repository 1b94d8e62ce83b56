"""What distances and rewards share: which judges a model has, and videos frame by frame."""

from collections.abc import Collection
from typing import Literal

from torch import Tensor

from recache_compile.errors import ModelError
from recache_compile.models.registry import find, owner_of

Kind = Literal["distance", "reward"]


def own_names(kind: Kind, model: str) -> tuple[str, ...]:
    """Names of the judges that a model has for itself; most models have none."""
    embedded = find(model)
    return () if embedded is None else embedded.own(kind)


def require_judge(kind: Kind | Literal["metric"], name: str, model: str, names: Collection[str]) -> None:
    """Raise `ModelError` unless a judge judges a model.

    Args:
        kind: of judge, for people.
        name: what the user asked for.
        model: as the user wrote it.
        names: of all that judge this model.
    """
    if name in names:
        return
    owner = owner_of(name)
    if owner is None or (kind != "metric" and name not in owner.own(kind)):
        raise ModelError(f"{kind} {name!r} is unknown; choose {', '.join(names)}")
    raise ModelError(f"{kind} {name!r} judges pictures of {owner.name} only, not of {model}; choose {', '.join(names)}")


def frames_of(pictures: Tensor, judge: str) -> tuple[Tensor, ...]:
    """The batch frame by frame in float32, which bounds the memory a long video takes.

    Args:
        pictures: (batch, 3, H, W) or (batch, frames, 3, H, W).
        judge: who asks, for the message.

    Raises:
        ModelError: the tensor is of neither kind.
    """
    if pictures.dim() not in (4, 5) or pictures.shape[-3] != 3:
        raise ModelError(
            f"{judge}: expected pictures (batch, 3, H, W) or videos (batch, frames, 3, H, W),"
            f" not a tensor of shape {tuple(pictures.shape)}"
        )
    return (pictures.float(),) if pictures.dim() == 4 else pictures.float().unbind(1)
