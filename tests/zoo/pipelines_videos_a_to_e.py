"""Pipelines of video models, A to E."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.tiny_pipelines import (
    COG_PARTS,
    FLOW,
    GUIDANCE,
    MASKED,
    NEGATIVE,
    TEXT,
    VIDEO_SIZE,
    WAN_SIZE,
    WAN_VAE,
    Part,
    calls,
    maker,
    part,
    prompt,
)
from tests.zoo.pipelines import PipelineCase
from tests.zoo.videos_a_to_h import ALLEGRO, ANYFLOW, ANYFLOW_FAR, CHRONOEDIT, COSMOS, COSMOS3_OMNI, EASYANIMATE

Inputs = Callable[[int], dict[str, Any]]


class NoGuard:
    """Takes the place of Cosmos' safety checker, which looks at prompts of words and at frames only."""

    def to(self, device: Any) -> "NoGuard":
        """It is everywhere."""
        return self


class WordTokenizer:
    """Makes a token of every word of a chat's last message."""

    eos_token_id = 0

    def convert_tokens_to_ids(self, token: str) -> int:
        """The number of a word."""
        return 1 + zlib.crc32(token.encode()) % 31

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> SimpleNamespace:
        """The numbers of all words."""
        return SimpleNamespace(input_ids=[self.convert_tokens_to_ids(word) for word in chat[-1]["content"].split()])


def pixels(n: int, *shape: int) -> Tensor:
    """Values between 0 and 1, drawn from n."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1000 + n))


def image_encoder() -> CLIPVisionModel:
    """Five tokens of width 20 for a picture."""
    config = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**config, image_size=8, patch_size=4))


def case(
    name: str, parts: dict[str, Part], size: dict[str, Any], inputs: Inputs = lambda n: {}, **options: Any
) -> PipelineCase:
    """A pipeline whose call takes prompts of embeddings and, drawn from n, further inputs."""
    call = calls(size, **{**GUIDANCE, **options})[0]
    return PipelineCase(name, maker(name, **parts), lambda n: call(n) | inputs(n))


def changed(transformer: Part, **config: Any) -> Part:
    """A transformer of another configuration."""
    name, before = transformer.args
    return part(name, **before | config)


def replaced(parts: dict[str, Part], **config: Any) -> dict[str, Part]:
    """The same parts with another configuration of the transformer."""
    return parts | {"transformer": changed(parts["transformer"], **config)}


TEXT_DIM = {"text_dim": TEXT}
TEXT_EMBED = {"text_embed_dim": TEXT}

COG_IMAGE_PARTS = replaced(COG_PARTS, in_channels=8)
ALLEGRO_PARTS = {
    "transformer": part(
        ALLEGRO.name, **ALLEGRO.config | {"caption_channels": TEXT, "sample_height": 8, "sample_width": 8}
    ),
    "scheduler": part("EulerAncestralDiscreteScheduler", beta_end=0.002),
    "vae": part("AutoencoderKLAllegro", block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2),
}
ANYFLOW_PARTS = {
    "transformer": part(ANYFLOW.name, **ANYFLOW.config | TEXT_DIM),
    "scheduler": part("FlowMapEulerDiscreteScheduler", shift=5.0),
    "vae": WAN_VAE,
}
FAR_PARTS = ANYFLOW_PARTS | {
    "transformer": part(ANYFLOW_FAR.name, **ANYFLOW_FAR.config | TEXT_DIM | {"chunk_partition": (1, 1)})
}
CHRONOEDIT_PARTS: dict[str, Any] = {
    "transformer": part(CHRONOEDIT.name, **CHRONOEDIT.config),
    "scheduler": part("UniPCMultistepScheduler", **FLOW),
    "vae": WAN_VAE,
    "image_encoder": partial(image_encoder),
    "image_processor": CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_rescale=False
    ),
}

COSMOS_PARTS: dict[str, Any] = {
    "transformer": part(COSMOS.name, **COSMOS.config | TEXT_EMBED),
    "scheduler": part(
        "EDMEulerScheduler", sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    ),
    "vae": part(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    ),
    "safety_checker": NoGuard(),
}
COSMOS2_PARTS = COSMOS_PARTS | {
    "scheduler": part("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
    "vae": WAN_VAE,
}
COSMOS25_PARTS = COSMOS2_PARTS | {
    "transformer": changed(
        COSMOS_PARTS["transformer"],
        in_channels=5,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=TEXT,
        encoder_hidden_states_channels=TEXT,
    ),
    "scheduler": part("UniPCMultistepScheduler", **FLOW),
}
IMAGE_CONTEXT = {"img_context_dim_in": 8, "img_context_dim_out": 32}
TRANSFER_PARTS = replaced(
    COSMOS25_PARTS, controlnet_block_every_n=2, max_size=(16, 16, 16), img_context_num_tokens=3, **IMAGE_CONTEXT
)
TRANSFER_PARTS |= {
    "controlnet": part(
        "CosmosControlNetModel",
        n_controlnet_blocks=2,
        in_channels=6,
        latent_channels=6,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2.0,
        adaln_lora_dim=8,
        max_size=(16, 16, 16),
        use_crossattn_projection=True,
        crossattn_proj_in_channels=TEXT,
        encoder_hidden_states_channels=TEXT,
        **TEXT_EMBED,
        **IMAGE_CONTEXT,
    )
}
COSMOS3_PARTS: dict[str, Any] = {
    "transformer": part(COSMOS3_OMNI.name, **COSMOS3_OMNI.config),
    "scheduler": part("UniPCMultistepScheduler", **FLOW),
    "vae": WAN_VAE,
    "text_tokenizer": WordTokenizer(),
    "enable_safety_checker": False,
}

EASY_PARTS = {
    "transformer": part(EASYANIMATE.name, **EASYANIMATE.config | TEXT_EMBED),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "vae": part(
        "AutoencoderKLMagvit",
        latent_channels=4,
        block_out_channels=[4, 4, 4, 4],
        layers_per_block=1,
        norm_num_groups=2,
    ),
}
EASY_INPAINT_PARTS = replaced(EASY_PARTS, in_channels=12, resize_inpaint_mask_directly=False)
EASY_CONTROL = case(
    "EasyAnimateControlPipeline",
    replaced(EASY_PARTS, in_channels=12),
    VIDEO_SIZE,
    lambda n: {"control_video": pixels(n, 1, 3, 5, 64, 64), "ref_image": pixels(n + 1, 1, 3, 1, 64, 64)},
    **MASKED,
)


def easy_control() -> DiffusionPipeline:
    """EasyAnimate with a control video; its call passes an argument that its `encode_prompt` does not know."""
    pipeline: Any = EASY_CONTROL.make()
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda text_encoder_index, **arguments: encode(**arguments)
    return pipeline  # type: ignore[no-any-return]


STILL = {"height": 32, "width": 32}

CASES = (
    case("CogVideoXPipeline", COG_PARTS, VIDEO_SIZE),
    case("CogVideoXImageToVideoPipeline", COG_IMAGE_PARTS, VIDEO_SIZE, lambda n: {"image": pixels(n, 1, 3, 64, 64)}),
    case(
        "CogVideoXVideoToVideoPipeline",
        COG_PARTS,
        {"height": 64, "width": 64, "strength": 0.6},
        lambda n: {"video": pixels(n, 5, 3, 64, 64)},
    ),
    case(
        "CogVideoXFunControlPipeline",
        COG_IMAGE_PARTS,
        {"height": 64, "width": 64},
        lambda n: {"control_video": pixels(n, 1, 5, 3, 64, 64)},
    ),
    case(
        "AllegroPipeline",
        ALLEGRO_PARTS,
        {"height": 64, "width": 64, "num_frames": 8},
        lambda n: {"negative_prompt": None},
        **MASKED,
    ),
    case("AnyFlowPipeline", ANYFLOW_PARTS, WAN_SIZE),
    case("AnyFlowFARPipeline", replaced(FAR_PARTS, chunk_partition=(2,), full_chunk_limit=2), WAN_SIZE),
    replace(
        case("AnyFlowFARPipeline", FAR_PARTS, WAN_SIZE),
        variant="two chunks",
        refused="is a function, which no program takes",
    ),
    case(
        "ChronoEditPipeline",
        CHRONOEDIT_PARTS,
        STILL,
        lambda n: {
            "image": pixels(n, 1, 3, 32, 32),
            "prompt_embeds": prompt(n, 512)["prompt_embeds"],  # the attention takes the last 512 tokens for the text
            "negative_prompt_embeds": prompt(NEGATIVE, 512)["prompt_embeds"],
        },
    ),
    case("CosmosTextToWorldPipeline", COSMOS_PARTS, WAN_SIZE),
    case(
        "CosmosVideoToWorldPipeline",
        replaced(COSMOS_PARTS, in_channels=5),
        WAN_SIZE,
        lambda n: {"image": pixels(n, 1, 3, 32, 32)},
    ),
    case("Cosmos2TextToImagePipeline", COSMOS2_PARTS, STILL),
    case(
        "Cosmos2VideoToWorldPipeline",
        replaced(COSMOS2_PARTS, in_channels=5),
        WAN_SIZE,
        lambda n: {"image": pixels(n, 1, 3, 32, 32)},
    ),
    case(
        "Cosmos2_5_PredictBasePipeline",
        COSMOS25_PARTS,
        WAN_SIZE,
        lambda n: {"image": None, "video": pixels(n, 1, 3, 5, 32, 32), "num_latent_conditional_frames": 1},
    ),
    case(
        "Cosmos2_5_TransferPipeline",
        TRANSFER_PARTS,
        {**STILL, "num_frames_per_chunk": 5},
        lambda n: {"controls": pixels(n, 1, 5, 3, 32, 32)},
    ),
    PipelineCase(
        "Cosmos3OmniPipeline",
        maker("Cosmos3OmniPipeline", **COSMOS3_PARTS),
        lambda n: {
            **WAN_SIZE,
            "prompt": f"a{n} cat{n} on{n} a mat",
            "negative_prompt": "blurry and dark",
            "guidance_scale": 4.0,
            "add_resolution_template": False,
            "add_duration_template": False,
        },
    ),
    case("EasyAnimatePipeline", EASY_PARTS, VIDEO_SIZE, **MASKED),
    case(
        "EasyAnimateInpaintPipeline",
        EASY_INPAINT_PARTS,
        VIDEO_SIZE,
        lambda n: {
            "video": pixels(n, 1, 3, 5, 64, 64),
            "mask_video": (pixels(n + 1, 1, 1, 5, 64, 64) > 0.5).float(),
            "strength": 0.6,
        },
        **MASKED,
    ),
    replace(EASY_CONTROL, make=easy_control),
)
