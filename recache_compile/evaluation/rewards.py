"""R of the training objective L = d(x, x_uncached) - alpha R(x): how well a result shows its prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recache_compile.errors import ModelError
from recache_compile.evaluation.judges import frames_of, own_names, require_judge
from recache_compile.evaluation.pretrained import load_clip, load_hpsv2, load_imagereward
from recache_compile.models.registry import find

PictureReward = Callable[[Tensor, Sequence[str]], Tensor]

REWARDS: dict[str, Callable[[], PictureReward]] = {
    "clip": load_clip,
    "hpsv2": load_hpsv2,
    "imagereward": load_imagereward,
}
"""Those that judge pictures of any model; embedded models may have others of their own."""


@dataclass(frozen=True, slots=True)
class Reward:
    """How well pictures or videos show their prompts: higher is better.

    Args:
        name: which reward it is.
        judge: pictures (batch, 3, H, W) float32 in [0, 1] and a prompt each, to (batch,).
    """

    name: str
    judge: PictureReward

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards (batch,) in float64, each of one sample alone; the mean over a video's frames.

        Args:
            pictures: (batch, 3, H, W) or (batch, frames, 3, H, W) in [0, 1].
            prompts: one for each sample.

        Raises:
            ModelError: not one prompt for each sample, or a prompt that the judge cannot read.
        """
        if len(prompts) != len(pictures):
            raise ModelError(
                f"reward {self.name}: {len(prompts)} prompts for {len(pictures)} samples; give one for each"
            )
        return torch.stack([self.judge(frame, prompts).double() for frame in frames_of(pictures, self.name)]).mean(0)


def get_reward(name: str, model: str) -> Reward:
    """The reward of this name, ready to use.

    Args:
        name: "none", a key of `REWARDS`, or a reward that the embedded model has for itself.
        model: whose pictures it will judge, as the user wrote it.

    Raises:
        ModelError: no reward has this name, or it does not judge this model.
        RuntimeUnavailableError: its package or its weights are missing.
    """
    own, embedded = own_names("reward", model), find(model)
    require_judge("reward", name, model, ("none", *own, *REWARDS))
    if embedded is not None and name in own:
        return Reward(name, embedded.code().reward(name))
    return Reward(name, _no_reward if name == "none" else REWARDS[name]())


def _no_reward(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.zeros(len(pictures), device=pictures.device)
