"""Pipelines of FLUX, FLUX.2 and what was made of them."""

import functools
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from tests.tiny_pipelines import (
    FLUX_PARTS,
    HEADS,
    IMAGE,
    NEGATIVE,
    POOLED,
    TEXT,
    TOKENS,
    UNSCALED,
    maker,
    part,
    prompt,
)
from tests.zoo.base import Case
from tests.zoo.images_a_to_l import BRIA, BRIA_FIBO, BRIA_FIBO2, CHROMA, LONG_CAT_IMAGE
from tests.zoo.images_n_to_z import OVIS_IMAGE
from tests.zoo.pipelines import PipelineCase

Call = Callable[[int], dict[str, Any]]


class Words:
    """A tokenizer: a number for each word of a text, `TOKENS` of them where a pipeline asks for tensors.

    Also the processor of pictures for a text encoder that does not look at pictures.
    """

    model_max_length = TOKENS
    merge_size = 2
    added_tokens_encoder: Mapping[str, int] = MappingProxyType({})

    @property
    def image_processor(self) -> "Words":
        """Itself."""
        return self

    def __call__(self, text: Any = None, images: Any = None, return_tensors: str = "", **options: Any) -> Any:
        """Numbers of one text or, as tensors, of all texts; of a picture, something of the right form."""
        if images is not None:
            return {"pixel_values": torch.zeros(1), "image_grid_thw": torch.tensor([[1, 2, 2]])}
        if not return_tensors:
            return {"input_ids": self._numbers(text)}
        rows = [self._numbers(each) for each in ([text] if isinstance(text, str) else text)]
        return self.pad({"input_ids": rows})

    def pad(self, encoded: dict[str, Any], **options: Any) -> SimpleNamespace:
        """Texts of `TOKENS` words."""
        ids = torch.tensor([(row + [0] * TOKENS)[:TOKENS] for row in encoded["input_ids"]])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def convert_tokens_to_ids(self, token: str) -> int:
        """The number of a word."""
        return zlib.crc32(token.encode()) % 1000

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return re.findall(r"<\|\w+\|>|\w+", text)

    def _numbers(self, text: str) -> list[int]:
        return [self.convert_tokens_to_ids(word) for word in self.tokenize(text)]


class TextEncoder(diffusers.ModelMixin):
    """A text encoder with three layers of hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """All layers, the last layer, and its last token."""
        states = [self.words(input_ids % 1000)]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1]))
        return _Encoded(states)


class _Encoded:
    def __init__(self, states: list[Tensor]) -> None:
        self.hidden_states = tuple(states)
        self.pooler_output = states[-1][:, -1]

    def __getitem__(self, at: int) -> Tensor:
        return (self.hidden_states[-1], self.pooler_output)[at]


FLUX = FLUX_PARTS["transformer"].args[1]  # the configuration of the transformer
SHIFTED = FLUX_PARTS["scheduler"]
CONTROLNET = {"controlnet": part("FluxControlNetModel", **FLUX | {"num_layers": 1, "num_single_layers": 1})}
KONTEXT = IMAGE | {"max_area": 256, "_auto_resize": False}
FLUX2_VAE = part(
    "AutoencoderKLFlux2",
    block_out_channels=(4,) * 4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
)
FLUX2: dict[str, Any] = {
    **HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "in_channels": 16,
    "joint_attention_dim": TEXT,
    "timestep_guidance_channels": 16,
    "mlp_ratio": 2.0,
    "axes_dims_rope": (2, 2, 4, 4),
}
FIBO_VAE = part(
    "AutoencoderKLWan",
    **UNSCALED,
    base_dim=4,
    z_dim=4,
    dim_mult=[1] * 5,
    num_res_blocks=1,
    temperal_downsample=[False] * 4,
)
LONG_CAT_VAE = part(  # 128 pixels to a latent: the pictures of LongCat have a fixed size
    "AutoencoderKL",
    block_out_channels=(2,) * 8,
    down_block_types=("DownEncoderBlock2D",) * 8,
    up_block_types=("UpDecoderBlock2D",) * 8,
    latent_channels=16,
    norm_num_groups=1,
    mid_block_add_attention=False,
    shift_factor=0.1,
)
BIG = {"height": 64, "width": 64}  # for the pipelines that refuse smaller pictures


def picture(n: int, size: int) -> Tensor:
    """Random pixels of picture number n."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(n))


def pil_picture(n: int, size: int = 64) -> Image.Image:
    """The same as a picture of PIL."""
    return Image.fromarray((picture(n, size)[0].permute(1, 2, 0) * 255).byte().numpy())


def half(size: int) -> Tensor:
    """A mask of the lower half of a picture."""
    return (torch.arange(size) >= size // 2).float()[None, None, :, None].expand(1, 1, size, size).contiguous()


def calling(
    fixed: dict[str, Any] | None = None,
    *pictures: str,
    make: Callable[[int, int], Any] = picture,
    negative: bool = True,
    **text: Any,
) -> Call:
    """How to call: the fixed arguments, pictures with these names, and the embeddings of both prompts.

    A picture whose name has "mask" in it is a mask.
    """

    def call(n: int) -> dict[str, Any]:
        size = (fixed or IMAGE).get("height", 16)
        drawn = {k: half(size) if "mask" in k else make(10 * n + at, size) for at, k in enumerate(pictures)}
        no = {f"negative_{k}": v for k, v in prompt(NEGATIVE, **text).items()} if negative else {}
        embeddings = {k: v.float() for k, v in (prompt(n, **text) | no).items()}
        return {**IMAGE, **embeddings, **drawn, **(fixed or {})}

    return call


def flux(name: str, call: Call, in_channels: int = 16, **parts: Any) -> PipelineCase:
    """A pipeline of FLUX.1 whose transformer takes that many channels and gives sixteen."""
    transformer = part("FluxTransformer2DModel", **FLUX | {"in_channels": in_channels, "out_channels": 16})
    return PipelineCase(name, maker(name, **FLUX_PARTS | {"transformer": transformer} | parts), call)


def flux2(name: str, call: Call, guidance_embeds: bool = False, **parts: Any) -> PipelineCase:
    """A pipeline of FLUX.2."""
    transformer = part("Flux2Transformer2DModel", **FLUX2, guidance_embeds=guidance_embeds)
    return PipelineCase(name, maker(name, transformer=transformer, scheduler=SHIFTED, vae=FLUX2_VAE, **parts), call)


def other(name: str, call: Call, of: Case, config: dict[str, Any] | None = None, **parts: Any) -> PipelineCase:
    """A pipeline whose transformer is one of the zoo, with another configuration."""
    changes = {"in_channels": 16, "joint_attention_dim": TEXT} if config is None else config
    transformer = functools.partial(_transformer, of.name, {**of.config, **changes})
    return PipelineCase(name, maker(name, **FLUX_PARTS | {"transformer": transformer} | parts), call)


def _transformer(name: str, config: dict[str, Any]) -> nn.Module:
    """Made of a configuration; ChromaInpaintPipeline asks that of Chroma for guidance as well."""
    made = part(name, **config)()
    if name.startswith("Chroma"):
        made.register_to_config(guidance_embeds=False)
    return made


def visual_cloze() -> DiffusionPipeline:
    """The pipeline of VisualCloze whose two inner pipelines are silent as well."""
    made = flux("VisualClozePipeline", cloze, 48, **TWO_WORDS, resolution=16).make()
    for inner in (made.generation_pipe, made.upsampling_pipe):
        inner.set_progress_bar_config(disable=True)
    return made


def cloze(n: int) -> dict[str, Any]:
    """An example of two pictures, and one picture whose partner is to be made; not without a generator."""
    rows = [[pil_picture(10 * n), pil_picture(10 * n + 1)], [pil_picture(10 * n + 2), None]]
    prompts = {"task_prompt": f"task {n}", "content_prompt": f"content {n * n}"}
    return prompts | {"image": rows, "generator": torch.Generator().manual_seed(0)}


def written(n: int) -> dict[str, Any]:
    """A prompt in words."""
    return {"prompt": f"{n} times number {n * n + 3}"}


def fibo2(n: int) -> dict[str, Any]:
    """Embeddings for FIBO 2, three for each token, and a picture."""
    drawn = [torch.randn(1, 3, TOKENS, 24, generator=torch.Generator().manual_seed(at)) for at in (n, NEGATIVE)]
    return {**BIG, "prompt_embeds": drawn[0], "negative_prompt_embeds": drawn[1], "image": pil_picture(n)}


SOME = {"strength": 0.6, "guidance_scale": 4.0}
TRUE = {"true_cfg_scale": 3.0}
PLAIN: dict[str, Any] = {"pooled": True, "negative": False}
MASKED = {"mask": "prompt_attention_mask"}
WORDS = {"tokenizer": Words(), "text_encoder": functools.partial(TextEncoder, TEXT)}
TWO_WORDS = {
    "tokenizer": Words(),
    "text_encoder": functools.partial(TextEncoder, POOLED),
    "tokenizer_2": Words(),
    "text_encoder_2": functools.partial(TextEncoder, TEXT),
}
WIDE: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": TEXT}
UPSAMPLED = {"upsampling_height": 24, "upsampling_width": 24}
LONG_CAT: dict[str, Any] = {"in_channels": 64, "joint_attention_dim": TEXT, "pooled_projection_dim": TEXT}
FIBO: dict[str, Any] = {"in_channels": 4, "joint_attention_dim": 2 * TEXT, "text_encoder_dim": TEXT}

CASES = (
    flux("FluxPipeline", calling(TRUE, pooled=True)),
    flux("FluxImg2ImgPipeline", calling(SOME | TRUE, "image", pooled=True)),
    flux("FluxInpaintPipeline", calling(SOME | TRUE, "image", "mask_image", pooled=True)),
    flux("FluxFillPipeline", calling({}, "image", "mask_image", **PLAIN), 48),
    flux("FluxKontextPipeline", calling(KONTEXT | TRUE, "image", pooled=True)),
    flux("FluxKontextInpaintPipeline", calling(KONTEXT | SOME | TRUE, "image", "mask_image", pooled=True)),
    flux("FluxControlPipeline", calling({}, "control_image", **PLAIN), 32),
    flux("FluxControlImg2ImgPipeline", calling(SOME, "image", "control_image", **PLAIN), 32),
    flux("FluxControlInpaintPipeline", calling(SOME, "image", "control_image", "mask_image", **PLAIN), 32),
    flux("FluxControlNetPipeline", calling(TRUE, "control_image", pooled=True), **CONTROLNET),
    flux("FluxControlNetImg2ImgPipeline", calling(SOME, "image", "control_image", **PLAIN), **CONTROLNET),
    flux("FluxControlNetInpaintPipeline", calling(SOME, "image", "control_image", "mask_image", **PLAIN), **CONTROLNET),
    flux("VisualClozeGenerationPipeline", cloze, 48, **TWO_WORDS, resolution=16),
    PipelineCase("VisualClozePipeline", visual_cloze, lambda n: cloze(n) | UPSAMPLED),
    flux2("Flux2Pipeline", calling(BIG, "image", make=pil_picture, negative=False), guidance_embeds=True),
    flux2("Flux2KleinPipeline", calling(BIG, "image", make=pil_picture)),
    flux2("Flux2KleinInpaintPipeline", calling(BIG | SOME, "image", "mask_image")),
    flux2("Flux2KleinKVPipeline", calling(BIG, negative=False)),
    replace(
        flux2("Flux2KleinKVPipeline", calling(BIG, "image", make=pil_picture, negative=False)),
        variant="with an image",
        refused="is neither a tensor nor None",
    ),
    other("ChromaPipeline", calling({}, **MASKED), CHROMA),
    other("ChromaImg2ImgPipeline", calling(SOME, "image", **MASKED), CHROMA),
    other("ChromaInpaintPipeline", calling(SOME | TRUE, "image", "mask_image", **MASKED), CHROMA),
    other("BriaPipeline", calling(), BRIA),
    other("BriaFiboPipeline", lambda n: BIG | written(n), BRIA_FIBO, FIBO, vae=FIBO_VAE, **WORDS),
    other(
        "BriaFiboEditPipeline",
        lambda n: BIG | {"prompt": {"edit_instruction": f"edit {n}"}, "image": pil_picture(n)},
        BRIA_FIBO,
        FIBO,
        vae=FIBO_VAE,
        **WORDS,
    ),
    other("BriaFibo2Pipeline", fibo2, BRIA_FIBO2, {}, vae=FLUX2_VAE),
    other("OvisImagePipeline", calling({"negative_prompt": None}), OVIS_IMAGE, WIDE),
    other(
        "LongCatImagePipeline",
        lambda n: written(n) | {"enable_prompt_rewrite": False, "height": 1024, "width": 1024},
        LONG_CAT_IMAGE,
        LONG_CAT,
        vae=LONG_CAT_VAE,
        text_processor=Words(),
        **WORDS,
    ),
    other(
        "LongCatImageEditPipeline",
        lambda n: written(n) | {"image": pil_picture(n)},
        LONG_CAT_IMAGE,
        LONG_CAT,
        vae=LONG_CAT_VAE,
        text_processor=Words(),
        **WORDS,
    ),
)
