"""What results are judged by, one number (or one feature vector) a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.evaluation.distances import Distance, get_distance
from recache_compile.evaluation.judges import require_judge
from recache_compile.evaluation.measure import signal_to_noise
from recache_compile.evaluation.pretrained import load_inception, load_vbench
from recache_compile.evaluation.rewards import get_reward
from recache_compile.models.registry import EMBEDDED, EmbeddedModel, OwnJudge, find

Judge = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""Results and the uncached results of the same noise, both (batch, 3, H, W) or (batch, frames, 3, H, W) in [0, 1], and
their prompts, to one value each (batch,), or one vector each (batch, features)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A way to judge results.

    Args:
        name: the user's and the tables' word for it.
        against: "uncached": the result of the same noise with every step recomputed; "prompt": what
            the sample shall show; "set": the distribution of many.
        higher: whether more is better.
        unit: beside its values, for people.
        counts: whether the project's target is about it: at most 1 % worse than uncached.
        title: what it is.
    """

    name: str
    against: Literal["uncached", "prompt", "set"]
    higher: bool
    unit: str
    counts: bool
    title: str


def _own(judge: OwnJudge) -> Metric:
    """The metric of a judge that an embedded model has for itself."""
    against: Literal["uncached", "prompt"] = "uncached" if judge.kind == "distance" else "prompt"
    return Metric(judge.name, against, judge.kind == "reward", judge.unit, judge.counts, judge.title)


_GENERAL = (
    Metric("psnr", "uncached", True, "dB", False, "peak signal-to-noise ratio"),
    Metric("ssim", "uncached", True, "", False, "structural similarity (Wang et al., 2004)"),
    Metric("lpips", "uncached", False, "", False, "LPIPS on AlexNet (arXiv 1801.03924)"),
    Metric("clip", "prompt", True, "", True, "CLIPScore, 100 times the cosine (arXiv 2104.08718)"),
    Metric("hpsv2", "prompt", True, "", False, "HPSv2.1 (arXiv 2306.09341)"),
    Metric("imagereward", "prompt", True, "", False, "ImageReward (arXiv 2304.05977)"),
    Metric("vbench", "prompt", True, "%", True, "mean of VBench's dimensions for any prompt (arXiv 2311.17982)"),
    Metric("fid", "set", False, "", True, "Frechet distance of features (arXiv 1706.08500)"),
)
_EMBEDDED = tuple(_own(judge) for model in EMBEDDED.values() for judge in model.judges)
METRICS = {
    each.name: each
    for against in ("uncached", "prompt", "set")
    for each in (*_GENERAL, *_EMBEDDED)
    if each.against == against
}
"""In the order of all tables."""
USUAL = ("psnr", "ssim", "lpips", "clip", "fid")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def usual_metrics(model: str, notice: Callable[[str], None]) -> tuple[str, ...]:
    """The metrics of a model where the user names none: those that can be had here.

    Args:
        model: as the user wrote it.
        notice: called with a line for each metric that is left out, saying why.
    """
    found = []
    embedded = find(model)
    for name in USUAL if embedded is None else embedded.metrics:
        try:
            judge_of(name, model)
        except RuntimeUnavailableError as error:
            notice(f"left out: {error}")
            continue
        found.append(name)
    return tuple(found)


def judge_of(name: str, model: str) -> Judge:
    """The judge of a metric, ready to use.

    Raises:
        ModelError: no metric has this name, or it does not judge this model.
        RuntimeUnavailableError: its package or its weights are missing.
    """
    embedded = find(model)
    own = () if embedded is None else tuple(judge.name for judge in embedded.judges)
    others = {judge.name for judge in _EMBEDDED} - set(own)
    require_judge("metric", name, model, [each for each in METRICS if each not in others])
    if name == "psnr":
        noise = Distance(name, signal_to_noise)
        return lambda made, uncached, prompts: noise(made, uncached)
    if name == "ssim":
        difference = get_distance(name, model)
        return lambda made, uncached, prompts: 1 - difference(made, uncached)
    if name == "fid":
        extract = load_inception() if embedded is None else embedded.code().features()
        return lambda made, uncached, prompts: extract(_one_picture(made))
    if name == "vbench":
        scores = load_vbench()
        return lambda made, uncached, prompts: scores(made, prompts)
    if METRICS[name].against == "uncached":
        distance = get_distance(name, model)
        return lambda made, uncached, prompts: distance(made, uncached)
    reward = get_reward(name, model)
    return lambda made, uncached, prompts: reward(made, prompts)


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder and those below it.

    Raises:
        ModelError: there are fewer than two.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if len(files) < 2:
        raise ModelError(
            f"reference {folder}: holds {len(files)} pictures ({', '.join(PICTURE_SUFFIXES)}); name a folder with many"
        )
    for file in files:
        try:
            with Image.open(file) as opened:
                opened.verify()
        except (OSError, SyntaxError) as error:
            raise ModelError(f"reference {file}: is no picture ({error}); remove it") from None
    return files


def features_of_folder(folder: Path, model: str) -> np.ndarray:
    """Features (pictures, features) of the pictures in a folder.

    Raises:
        ModelError: there are fewer than two, or one cannot be read.
    """
    judge, embedded, found = judge_of("fid", model), find(model), []
    for file in pictures_in(folder):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        if embedded is not None:
            picture = picture.resize((embedded.code().PICTURE_SIZE,) * 2, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        found.append(judge(pixels, pixels, ()))
    return torch.cat(found).double().numpy()


def features_of_reference(embedded: EmbeddedModel, prompts: Sequence[str]) -> np.ndarray:
    """Features (pictures, features) of what an embedded model should draw for captions, taken in turn."""
    return embedded.code().reference_features(prompts).double().numpy()


def _one_picture(made: Tensor) -> Tensor:
    """Pictures as they are, and of videos the middle frames."""
    return (made if made.dim() == 4 else made[:, made.shape[1] // 2]).float()
