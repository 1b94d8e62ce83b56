"""Pipelines of image models, Qwen-Image to Kandinsky 5."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import BatchFeature, Qwen3VLTextConfig, Qwen3VLTextModel

from tests.tiny_pipelines import (
    HEADS,
    IMAGE,
    NEGATIVE,
    QWEN_PARTS,
    TEXT,
    TOKENS,
    TRUE_CFG,
    UNPADDED,
    Call,
    Part,
    calls,
    image_vae,
    maker,
    part,
)
from tests.zoo.base import Case
from tests.zoo.images_a_to_l import ERNIE_IMAGE, GLM_IMAGE, HI_DREAM_IMAGE, HUNYUAN_IMAGE, IDEOGRAM4, KREA2
from tests.zoo.images_n_to_z import (
    JOY_IMAGE_EDIT,
    JOY_IMAGE_EDIT_PLUS,
    NUCLEUS_MOE,
    OMNI_GEN,
    QWEN_IMAGE_21,
    Z_IMAGE,
)
from tests.zoo.pipelines import ROUNDED, PipelineCase
from tests.zoo.videos_k_to_z import KANDINSKY5

VOCABULARY = 40
SIZE_64 = {"height": 64, "width": 64}


def normal(n: int, *shape: int) -> Tensor:
    """Random values drawn from n."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(n))


def pixels(n: int, size: int = 16) -> Tensor:
    """A picture drawn from n, its values between 0 and 1."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(n))


def picture(n: int, size: int = 16, mode: str = "RGB") -> Image.Image:
    """A picture drawn from n."""
    channels = len(mode)
    return Image.fromarray(np.random.default_rng(n).integers(0, 256, (size, size, channels), dtype=np.uint8), mode)


def half_mask(size: int = 16) -> Tensor:
    """A mask of the left half of a picture."""
    return (torch.arange(size) < size // 2).float().expand(1, 1, size, size)


class Tokens:
    """Stands for a tokenizer or a processor: as many tokens for every text, drawn from its letters."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.model_max_length = 64

    @property
    def tokenizer(self) -> "Tokens":
        """A processor's tokenizer."""
        return self

    def __call__(self, text: str | list[str], return_tensors: str = "", **_: Any) -> BatchFeature:
        """The tokens of each text, none of them padding; a text alone is no batch unless tensors are asked for."""
        texts = [text] if isinstance(text, str) else text
        ids = torch.stack([self._drawn(each) for each in texts])
        if return_tensors:
            return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return BatchFeature({"input_ids": ids[0].tolist() if isinstance(text, str) else ids.tolist()})

    def _drawn(self, text: str) -> Tensor:
        letters = sum((at + 1) * value for at, value in enumerate(text.encode()))
        return torch.randint(3, VOCABULARY, (self.count,), generator=torch.Generator().manual_seed(letters))

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **_: Any) -> Any:
        """Two tokens, or the messages as a text."""
        return [[0, 1]] if tokenize else str(messages)

    def encode(self, _: str) -> list[int]:
        """One token."""
        return [2]


class Model(nn.Module):
    """What pipelines ask of every model."""

    dtype = torch.float32
    device = torch.device("cpu")


class TextModel(Model):
    """Stands for a language model that also sees images: embeddings of the tokens."""

    def __init__(self, width: int = TEXT) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(VOCABULARY, width)])

    @property
    def model(self) -> "TextModel":
        """The model without its head."""
        return self

    @property
    def language_model(self) -> "TextModel":
        """The part that reads text."""
        return self

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """The last hidden states."""
        return self.layers[-1](input_ids)


class Qwen3(Model):
    """A text encoder of as many layers as Ideogram 4 takes features of."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3VLTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=36,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            pad_token_id=0,
        )
        self.language_model = Qwen3VLTextModel(config)


class Siglip(Model):
    """Stands for an image encoder, and for its processor: four tokens for each picture."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 12)

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        """The tokens."""
        return SimpleNamespace(last_hidden_state=self.projection(pixel_values))


def siglip_inputs(images: list[Image.Image], **_: Any) -> BatchFeature:
    """What the image encoder takes."""
    means = [torch.tensor(np.asarray(each.resize((2, 2)))).float().reshape(4, 3) / 255 for each in images]
    return BatchFeature({"pixel_values": torch.stack(means), "spatial_shapes": torch.tensor([[2, 2]] * len(images))})


class Pooled(Model):
    """Stands for a VAE, of pipelines that enlarge every picture to a million pixels: a latent is a mean of many."""

    def __init__(self, side: int, channels: int = 4) -> None:
        super().__init__()
        self.side, self.channels = side, channels
        self.temperal_downsample = [False] * (side.bit_length() - 1)
        self.config = SimpleNamespace(
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=[0.5] * channels,
            scale_factor_spatial=side,
            scale_factor_temporal=4,
        )

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """A distribution of one value."""
        *batch, height, width = pictures.shape
        means = functional.avg_pool2d(pictures.flatten(0, -4), self.side)
        means = means.reshape(*batch, height // self.side, width // self.side)
        latents = means[:, torch.arange(self.channels) % pictures.shape[1]]
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda *_: latents, mode=lambda: latents))

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        """The latents themselves."""
        return (latents,)


def both(call: Call, more: Call) -> Call:
    """The arguments of two calls together."""
    return lambda n: call(n) | more(n)


def case(name: str, parts: dict[str, Any], call: Call, **options: Any) -> PipelineCase:
    """The case of a pipeline class made of these parts."""
    return PipelineCase(name, maker(name, **parts), call, **options)


QWEN = calls(IMAGE, **TRUE_CFG, **UNPADDED)[0]
QWEN_UNSIZED = calls({}, **TRUE_CFG, **UNPADDED)[0]
QWEN_CONTROLNET = {
    **HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 4, 4),
}
QWEN_EDIT_PARTS = QWEN_PARTS | {"vae": functools.partial(Pooled, 128)}
LAYERED = part(
    "QwenImageTransformer2DModel",
    **HEADS,
    in_channels=32,
    out_channels=8,
    num_layers=3,
    joint_attention_dim=TEXT,
    axes_dims_rope=(4, 4, 4),
    use_additional_t_cond=True,
    use_layer3d_rope=True,
)
QWEN_21_PARTS = {
    "transformer": part(QWEN_IMAGE_21.name, **QWEN_IMAGE_21.config | {"context_in_dim": TEXT}),
    "scheduler": QWEN_PARTS["scheduler"],
    "processor": Tokens(TOKENS),
}
QWEN_21 = calls(SIZE_64, **TRUE_CFG, **UNPADDED)[0]


def strong(n: int) -> dict[str, Any]:
    """A picture to start from."""
    return {"image": pixels(n), "strength": 0.6}


def inpainted(n: int) -> dict[str, Any]:
    """A picture to start from and what to change of it."""
    return strong(n) | {"mask_image": half_mask()}


QWEN_CASES = (
    case("QwenImagePipeline", QWEN_PARTS, QWEN),
    case("QwenImageEditPipeline", QWEN_EDIT_PARTS, both(QWEN_UNSIZED, lambda n: {"image": picture(n)})),
    case("QwenImageEditPlusPipeline", QWEN_EDIT_PARTS, both(QWEN_UNSIZED, lambda n: {"image": [picture(n)]})),
    case(
        "QwenImageControlNetPipeline",
        QWEN_PARTS | {"controlnet": part("QwenImageControlNetModel", **QWEN_CONTROLNET)},
        both(QWEN, lambda n: {"control_image": pixels(n)}),
    ),
    case(
        "QwenImageControlNetInpaintPipeline",
        QWEN_PARTS | {"controlnet": part("QwenImageControlNetModel", **QWEN_CONTROLNET, extra_condition_channels=4)},
        both(QWEN, lambda n: {"control_image": pixels(n), "control_mask": half_mask()}),
    ),
    case("QwenImageImg2ImgPipeline", QWEN_PARTS, both(QWEN, strong)),
    case("QwenImageInpaintPipeline", QWEN_PARTS, both(QWEN, inpainted)),
    case(
        "QwenImageEditInpaintPipeline",
        QWEN_EDIT_PARTS,
        both(QWEN_UNSIZED, lambda n: {"image": picture(n), "mask_image": Image.linear_gradient("L"), "strength": 0.6}),
    ),
    case(
        "QwenImageLayeredPipeline",
        QWEN_PARTS
        | {
            "vae": functools.partial(Pooled, 64, 8),
            "transformer": LAYERED,
            "text_encoder": functools.partial(TextModel),
        },
        both(
            QWEN_UNSIZED,
            lambda n: {"image": picture(n, mode="RGBA"), "prompt": "text", "layers": 1, "output_type": "pt"},
        ),
    ),
    case("QwenImage21Pipeline", QWEN_21_PARTS, both(QWEN_21, lambda n: {"use_kv_cache": False})),
    case(
        "QwenImage21Pipeline",
        QWEN_21_PARTS,
        QWEN_21,
        variant="with its key-value cache",
        refused="it writes to an object among its arguments",
    ),
)

FLOW = part("FlowMatchEulerDiscreteScheduler", shift=3.0)
DYNAMIC_FLOW = QWEN_PARTS["scheduler"]
# four levels, as pipelines take it that know the VAE
DEEP_VAE = part(
    "AutoencoderKL",
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    block_out_channels=(4, 4, 4, 4),
    norm_num_groups=2,
    mid_block_add_attention=False,
    shift_factor=0.1,
    scaling_factor=0.36,
)

Z_PARTS = {
    "transformer": part(Z_IMAGE.name, **Z_IMAGE.config | {"cap_feat_dim": TEXT}),
    "scheduler": FLOW,
    "vae": image_vae(shift_factor=0.1, scaling_factor=0.36),
}
Z_CONTROLNET = {
    "control_layers_places": [0, 2],
    "control_refiner_layers_places": [0, 1],
    "add_control_noise_refiner": "control_noise_refiner",
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
}


def halved(make_vae: Part) -> nn.Module:
    """A VAE in bfloat16."""
    return make_vae().bfloat16()


def z_call(n: int) -> dict[str, Any]:
    """One prompt without padding, its embeddings in a list."""
    return IMAGE | {
        "prompt_embeds": [normal(n, TOKENS, TEXT)],
        "negative_prompt_embeds": [normal(NEGATIVE, TOKENS, TEXT)],
        "guidance_scale": 4.0,
    }


Z_CASES = (
    case("ZImagePipeline", Z_PARTS, z_call),
    case("ZImageImg2ImgPipeline", Z_PARTS, both(z_call, strong)),
    case("ZImageInpaintPipeline", Z_PARTS, both(z_call, inpainted)),
    case(
        "ZImageControlNetPipeline",
        Z_PARTS | {"controlnet": part("ZImageControlNetModel", **Z_CONTROLNET, control_in_dim=4)},
        both(z_call, lambda n: {"control_image": pixels(n)}),
    ),
    case(
        "ZImageControlNetInpaintPipeline",
        Z_PARTS | {"controlnet": part("ZImageControlNetModel", **Z_CONTROLNET, control_in_dim=9)},
        both(z_call, lambda n: {"control_image": pixels(n), "image": pixels(n + 1), "mask_image": half_mask()}),
    ),
    case(
        "ZImageOmniPipeline",
        Z_PARTS
        | {
            "transformer": part(Z_IMAGE.name, **Z_IMAGE.config | {"cap_feat_dim": TEXT, "siglip_feat_dim": 12}),
            "vae": functools.partial(halved, DEEP_VAE),
            "siglip": functools.partial(Siglip),
            "siglip_processor": siglip_inputs,
        },
        lambda n: {
            "prompt_embeds": [[normal(n + at, TOKENS, TEXT) for at in range(3)]],
            "negative_prompt_embeds": [[normal(NEGATIVE + at, TOKENS, TEXT) for at in range(3)]],
            "guidance_scale": 4.0,
            "image": [picture(n, 64)],
        },
    ),
)


def changed(make: Callable[[], DiffusionPipeline], **attributes: Any) -> Callable[[], DiffusionPipeline]:
    """The same pipeline with other attributes."""

    def make_changed() -> DiffusionPipeline:
        pipeline = make()
        for name, value in attributes.items():
            setattr(pipeline, name, value)
        return pipeline

    return make_changed


def guided(call: Call, **more: Any) -> Call:
    """Calls with a negative prompt."""
    return lambda n: call(n) | {f"negative_{name}": value for name, value in call(NEGATIVE).items()} | more


def padded(n: int, tokens: int = TOKENS) -> Tensor:
    """The mask of a prompt, its last tokens padding."""
    return (torch.arange(tokens) < tokens - 1 - n % 3)[None].long()


def transformer(zoo_case: Case, **changes: Any) -> Any:
    """The transformer of the zoo's case."""
    return part(zoo_case.name, **zoo_case.config | changes)


def hunyuan_prompt(n: int) -> dict[str, Any]:
    """Embeddings of two text encoders."""
    return {
        "prompt_embeds": normal(n, 1, TOKENS, 24),
        "prompt_embeds_mask": padded(n),
        "prompt_embeds_2": normal(n, 1, 4, 20),
        "prompt_embeds_mask_2": padded(n, 4),
    }


def kandinsky_prompt(n: int) -> dict[str, Any]:
    """Embeddings of two text encoders, and where each prompt starts."""
    return {
        "prompt_embeds_qwen": normal(n, 1, TOKENS, 24),
        "prompt_embeds_clip": normal(n, 1, 12),
        "prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
    }


def masked_prompt(n: int) -> dict[str, Any]:
    """Embeddings with padding."""
    return {"prompt_embeds": normal(n, 1, TOKENS, 24), "prompt_embeds_mask": padded(n)}


GUIDER = part("AdaptiveProjectedMixGuidance", adaptive_projected_guidance_start_step=3)
OTHER_CASES = (
    case(
        "Krea2Pipeline",
        {"transformer": transformer(KREA2, in_channels=16), "scheduler": DYNAMIC_FLOW, "vae": QWEN_PARTS["vae"]},
        guided(
            lambda n: {"prompt_embeds": normal(n, 1, TOKENS, 3, 24), "prompt_embeds_mask": padded(n).bool()},
            **IMAGE,
            guidance_scale=4.0,
        ),
    ),
    case(
        "ErnieImagePipeline",
        {"transformer": transformer(ERNIE_IMAGE), "scheduler": FLOW},
        lambda n: (
            SIZE_64
            | {
                "prompt_embeds": [normal(n, TOKENS, 24)],
                "negative_prompt_embeds": [normal(NEGATIVE, 4, 24)],
                "guidance_scale": 4.0,
            }
        ),
    ),
    PipelineCase(
        "HiDreamImagePipeline",
        changed(
            maker("HiDreamImagePipeline", transformer=transformer(HI_DREAM_IMAGE), scheduler=FLOW),
            default_sample_size=8,
        ),
        guided(
            lambda n: {
                "prompt_embeds_t5": normal(n, 1, 4, 24),
                "prompt_embeds_llama3": normal(n, 3, 1, 4, 20),
                "pooled_prompt_embeds": normal(n, 1, 12),
            },
            **SIZE_64,
            guidance_scale=4.0,
        ),
        refused=".numpy() is not supported",
    ),
    case(
        "GlmImagePipeline",
        {"transformer": transformer(GLM_IMAGE), "scheduler": part("FlowMatchEulerDiscreteScheduler")},
        lambda n: (
            SIZE_64
            | {
                "prompt_embeds": normal(n, 1, TOKENS, 24),
                "negative_prompt_embeds": normal(NEGATIVE, 1, TOKENS, 24),
                "prior_token_ids": torch.randint(20, (1, 16), generator=torch.Generator().manual_seed(n)),
                "guidance_scale": 4.0,
            }
        ),
    ),
    case(
        "NucleusMoEImagePipeline",
        {
            "transformer": functools.partial(NUCLEUS_MOE.build),
            "scheduler": DYNAMIC_FLOW,
            "vae": QWEN_PARTS["vae"],
        },
        guided(
            lambda n: {"prompt_embeds": normal(n, 1, 8, 24), "prompt_embeds_mask": padded(n, 8)},
            **IMAGE,
            guidance_scale=4.0,
        ),
    ),
    case(
        "OmniGenPipeline",
        {
            "transformer": transformer(OMNI_GEN),
            "scheduler": part("FlowMatchEulerDiscreteScheduler", invert_sigmas=True, num_train_timesteps=1),
            "vae": DEEP_VAE,
            "tokenizer": Tokens(5),
        },
        lambda n: (
            SIZE_64
            | {"prompt": f"<img><|image_1|></img> number {n}", "input_images": [picture(n, 32)], "guidance_scale": 3.0}
        ),
    ),
    case(
        "Ideogram4Pipeline",
        {
            "transformer": transformer(IDEOGRAM4, llm_features_dim=104),
            "unconditional_transformer": transformer(IDEOGRAM4, llm_features_dim=104),
            "scheduler": FLOW,
            "text_encoder": functools.partial(Qwen3),
            "tokenizer": Tokens(4),
        },
        lambda n: (
            SIZE_64
            | {"prompt": f"number {n}", "max_sequence_length": 6, "guidance_scale": 4.0, "guidance_schedule": None}
        ),
    ),
    case(
        "HunyuanImagePipeline",
        {"transformer": transformer(HUNYUAN_IMAGE), "scheduler": FLOW, "guider": GUIDER, "ocr_guider": GUIDER},
        guided(hunyuan_prompt, height=128, width=128),
    ),
    case(
        "HunyuanImageRefinerPipeline",
        {
            "transformer": transformer(
                HUNYUAN_IMAGE,
                out_channels=4,
                patch_size=(1, 1, 1),
                rope_axes_dim=(4, 6, 6),
                text_embed_2_dim=None,
                guidance_embeds=True,
            ),
            "scheduler": FLOW,
            "guider": GUIDER,
        },
        both(guided(masked_prompt, **SIZE_64), lambda n: {"image": normal(n, 1, 4, 1, 4, 4)}),
    ),
    case(
        "JoyImageEditPipeline",
        {"transformer": transformer(JOY_IMAGE_EDIT), "scheduler": FLOW, "vae": functools.partial(Pooled, 128)},
        both(guided(masked_prompt, guidance_scale=4.0), lambda n: {"image": picture(n)}),
    ),
    case(
        "JoyImageEditPlusPipeline",
        {
            "transformer": transformer(JOY_IMAGE_EDIT_PLUS),
            "scheduler": FLOW,
            "vae": functools.partial(Pooled, 128),
            "text_encoder": functools.partial(TextModel, 24),
            "processor": Tokens(40),
        },
        lambda n: {"images": [picture(n)], "prompt": f"number {n}", "guidance_scale": 4.0},
    ),
    PipelineCase(
        "Kandinsky5T2IPipeline",
        changed(
            maker("Kandinsky5T2IPipeline", transformer=transformer(KANDINSKY5, visual_cond=False), scheduler=FLOW),
            resolutions=[(64, 64)],
        ),
        guided(kandinsky_prompt, **SIZE_64, guidance_scale=1.5),
        exact=ROUNDED,
    ),
    PipelineCase(
        "Kandinsky5I2IPipeline",
        changed(
            maker("Kandinsky5I2IPipeline", transformer=transformer(KANDINSKY5), scheduler=FLOW, vae=DEEP_VAE),
            resolutions=[(64, 64)],
        ),
        both(guided(kandinsky_prompt, **SIZE_64, guidance_scale=1.5), lambda n: {"image": picture(n, 64)}),
        exact=ROUNDED,
    ),
)

CASES = QWEN_CASES + Z_CASES + OTHER_CASES
