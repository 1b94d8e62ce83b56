"""Judges with downloaded weights, from optional packages imported on first use."""

import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from recache_compile.errors import ModelError, RuntimeUnavailableError, importing, reason_of

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
ALEXNET_SIDE = 31
"""Pixels that AlexNet's two poolings leave at least one feature of."""
CLIP_WEIGHTS = "openai/clip-vit-base-patch32"
HPS_MODEL = "ViT-H-14"
HPS_WEIGHTS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
IMAGE_REWARD_WEIGHTS = "THUDM/ImageReward"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
VBENCH_DIMENSIONS = {
    "subject_consistency": 1,
    "background_consistency": 1,
    "motion_smoothness": 1,
    "dynamic_degree": 1,
    "aesthetic_quality": 1,
    "imaging_quality": 100,
}
"""Those of VBench's sixteen that judge videos of any prompt, and the best score of a video (release 0.1.5)."""
VIDEO_FPS = 16
"""Of the files that VBench reads."""


@dataclass(frozen=True, slots=True)
class Lpips:
    """LPIPS (arXiv 1801.03924): distance of deep features, weighted to agree with people.

    Args:
        network: `lpips.LPIPS`; takes two batches (batch, 3, H, W) in [-1, 1].
    """

    network: Any

    def __call__(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """(batch,) from pictures (batch, 3, H, W) in [0, 1]; those too small for AlexNet are enlarged."""
        network = self.network.to(pictures.device)
        return network(_enlarged(pictures) * 2 - 1, _enlarged(reference) * 2 - 1).flatten()


@dataclass(frozen=True, slots=True)
class ClipScore:
    """CLIPScore (arXiv 2104.08718): 100 times the cosine of picture and prompt, not cut at zero.

    Args:
        model: `transformers.CLIPModel`.
        processor: its `CLIPProcessor`; prompts are cut at the model's length.
    """

    model: Any
    processor: Any

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(batch,) from pictures (batch, 3, H, W) in [0, 1]."""
        inputs = self.processor(
            text=list(prompts), images=_images(pictures), return_tensors="pt", padding=True, truncation=True
        ).to(pictures.device)
        read = self.model.to(pictures.device)(**inputs)
        return 100 * cosine_similarity(read.image_embeds, read.text_embeds)


@dataclass(frozen=True, slots=True)
class HumanPreference:
    """HPSv2.1 (arXiv 2306.09341): cosine under a CLIP fine-tuned on people's choices, about 0.2 to 0.35.

    Args:
        model: an `open_clip` model.
        preprocess: its evaluation transform, from one PIL picture.
        tokenize: its tokenizer, from a list of prompts.
    """

    model: Any
    preprocess: Any
    tokenize: Any

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(batch,) from pictures (batch, 3, H, W) in [0, 1]."""
        model = self.model.to(pictures.device)
        images = torch.stack([self.preprocess(image) for image in _images(pictures)]).to(pictures.device)
        tokens = self.tokenize(list(prompts)).to(pictures.device)
        return cosine_similarity(model.encode_image(images), model.encode_text(tokens))


@dataclass(frozen=True, slots=True)
class ImageReward:
    """ImageReward (arXiv 2304.05977): a preference model's score, standardised, about -2 to 2.

    Args:
        model: what `ImageReward.load` returns; it stays on the device it was loaded to.
    """

    model: Any

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(batch,) from pictures (batch, 3, H, W) in [0, 1]."""
        pairs = zip(prompts, _images(pictures), strict=True)
        return torch.tensor([self.model.score(prompt, image) for prompt, image in pairs], device=pictures.device)


@dataclass(frozen=True, slots=True)
class InceptionFeatures:
    """The 2,048 features of InceptionV3 that the Frechet inception distance is taken of (arXiv 1706.08500).

    Args:
        network: torchmetrics' `NoTrainInceptionV3`, from pictures (batch, 3, H, W) of bytes.
    """

    network: Any

    def __call__(self, pictures: Tensor) -> Tensor:
        """(batch, 2048) from pictures (batch, 3, H, W) in [0, 1]."""
        return self.network.to(pictures.device)(bytes_of(pictures))


@dataclass(frozen=True, slots=True)
class VideoBench:
    """The mean of VBench's dimensions for any prompt (arXiv 2311.17982), in percent.

    Args:
        package: the module `vbench`.
    """

    package: Any

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """(batch,) from videos (batch, frames, 3, H, W) in [0, 1]."""
        if videos.dim() != 5:
            raise ModelError("metric vbench: judges videos, not pictures; leave it out")
        from diffusers.utils import export_to_video

        with tempfile.TemporaryDirectory() as place:
            names = [str(Path(place, f"{number}.mp4")) for number in range(len(videos))]
            for name, video in zip(names, videos, strict=True):
                export_to_video(list(video.permute(0, 2, 3, 1).float().cpu().numpy()), name, fps=VIDEO_FPS)
            info = Path(self.package.__file__).with_name("VBench_full_info.json")
            bench = self.package.VBench(videos.device, str(info), place)
            given = dict(zip(names, prompts, strict=True))
            with _loading("metric vbench", "of VBench", "run it once where there is a network, or leave vbench out"):
                bench.evaluate(place, "recache", given, list(VBENCH_DIMENSIONS), mode="custom_input")
            found = json.loads(Path(place, "recache_eval_results.json").read_text(encoding="utf-8"))
        totals = torch.zeros(len(videos), dtype=torch.float64)
        for dimension, best in VBENCH_DIMENSIONS.items():
            for each in found[dimension][1]:
                totals[int(Path(each["video_path"]).stem)] += float(each["video_results"]) / best
        return 100 * totals / len(VBENCH_DIMENSIONS)


def bytes_of(pictures: Tensor) -> Tensor:
    """Pictures of any shape with values in [0, 1] as files hold them, 0 to 255."""
    return (pictures * 255).round().clamp(0, 255).byte()


def load_lpips() -> Lpips:
    """LPIPS on AlexNet."""
    with importing("distance lpips", "pip install 'recache-compile[train]'"):
        import lpips
    remedy = f"put the file from {ALEXNET_URL} into {torch.hub.get_dir()}/checkpoints, or choose distance ssim or mse"
    with _loading("distance lpips", f"torchvision's AlexNet ({ALEXNET_URL.rpartition('/')[2]})", remedy):
        return Lpips(lpips.LPIPS(net="alex", verbose=False))


def load_clip() -> ClipScore:
    """CLIPScore with OpenAI's ViT-B/32."""
    with importing("reward clip", "pip install 'recache-compile[hub]'"):
        from transformers import CLIPModel, CLIPProcessor
    with _loading("reward clip", CLIP_WEIGHTS, f"run `hf download {CLIP_WEIGHTS}` where there is a network"):
        processor = CLIPProcessor.from_pretrained(CLIP_WEIGHTS)
        return ClipScore(CLIPModel.from_pretrained(CLIP_WEIGHTS).eval(), processor)


def load_hpsv2() -> HumanPreference:
    """HPSv2.1 in `open_clip`, of which package hpsv2 holds a fork that lacks its vocabulary (release 1.2.0)."""
    with importing("reward hpsv2", "pip install 'recache-compile[rewards]'"):
        import open_clip
        from huggingface_hub import hf_hub_download
    remedy = f"run `hf download {' '.join(HPS_WEIGHTS)}` where there is a network"
    with _loading("reward hpsv2", "/".join(HPS_WEIGHTS), remedy):
        model, _, preprocess = open_clip.create_model_and_transforms(HPS_MODEL, hf_hub_download(*HPS_WEIGHTS))
        return HumanPreference(model.eval(), preprocess, open_clip.get_tokenizer(HPS_MODEL))


def load_imagereward() -> ImageReward:
    """ImageReward-v1.0, whose package pins versions that do not fit ours: no extra can bring it."""
    install = "pip install image-reward git+https://github.com/openai/CLIP, in an environment with the versions it pins"
    with importing("reward imagereward", install):
        import ImageReward as package  # noqa: N813 - the package's own name is that of our class
    remedy = f"run `hf download {IMAGE_REWARD_WEIGHTS} --local-dir ~/.cache/ImageReward` where there is a network"
    with _loading("reward imagereward", IMAGE_REWARD_WEIGHTS, remedy):
        return ImageReward(package.load("ImageReward-v1.0"))


def load_inception() -> InceptionFeatures:
    """InceptionV3 as ported for torch-fidelity."""
    with importing("metric fid", "pip install 'recache-compile[evaluate]'"):
        import torch_fidelity  # noqa: F401 - torchmetrics needs it
        from torchmetrics.image.fid import NoTrainInceptionV3
    remedy = f"put the file into {torch.hub.get_dir()}/checkpoints, or leave fid out"
    with _loading("metric fid", f"InceptionV3 ({INCEPTION_WEIGHTS})", remedy):
        return InceptionFeatures(NoTrainInceptionV3("inception-v3-compat", ["2048"]))


def load_vbench() -> VideoBench:
    """VBench, which pins versions that do not fit ours: no extra can bring it."""
    with importing("metric vbench", "pip install vbench imageio-ffmpeg, in an environment with the versions it pins"):
        import vbench
    return VideoBench(vbench)


@contextlib.contextmanager
def _loading(judge: str, weights: str, remedy: str) -> Iterator[None]:
    """One line for weights that are not here and cannot be downloaded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips and ImageReward use torchvision's and timm's old names
            yield
    except Exception as error:  # URLs, the Hub and damaged files raise many kinds
        raise RuntimeUnavailableError(
            f"{judge}: the weights {weights} cannot be loaded: {reason_of(error)}; {remedy}"
        ) from error


def _enlarged(pictures: Tensor) -> Tensor:
    side = min(pictures.shape[-2:])
    factor = math.ceil(ALEXNET_SIDE / side)
    return interpolate(pictures, scale_factor=float(factor), mode="bilinear") if factor > 1 else pictures


def _images(pictures: Tensor) -> list[Image.Image]:
    """Pictures (batch, 3, H, W) in [0, 1] as the files that a person would look at."""
    rows = bytes_of(pictures).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]
