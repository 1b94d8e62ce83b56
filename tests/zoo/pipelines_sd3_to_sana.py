"""Pipelines of SD3, PixArt, Sana, Hunyuan-DiT, DiT, Lumina, AuraFlow, PRX and CogView, their ControlNets and PAG."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_pipelines import (
    DIT_PARTS,
    GUIDANCE,
    HEADS,
    IMAGE,
    LATENTS,
    MASKED,
    NEGATIVE,
    PIXART_PARTS,
    POOLED,
    SANA_PARTS,
    SANA_SIZE,
    SD3_PARTS,
    TEXT,
    TOKENS,
    UNBINNED,
    Call,
    Part,
    calls,
    image_vae,
    maker,
    part,
    prompt,
)
from tests.zoo.pipelines import PipelineCase

GUIDED: dict[str, Any] = {"guidance_scale": 4.0}
PAG: dict[str, Any] = {"pag_scale": 2.0}
FINE = {"height": 64, "width": 64}  # for the VAE of eight pixels to a latent
UNBINNED_PRX = {"use_resolution_binning": False}


def changed(base: Part, **config: Any) -> Part:
    """A component of the same class, some of its configuration another."""
    name, values = base.args
    return part(name, **values | config)


def picture(n: int, *shape: int) -> Tensor:
    """An image for prompt number n, from 0 to 1."""
    return torch.rand(1, *(shape or (3, 16, 16)), generator=torch.Generator().manual_seed(n))


def with_images(call: Call, *names: str, size: int = 16, **more: Any) -> Call:
    """The call with an image for each of these arguments; a mask has one channel of zeros and ones."""

    def arguments(n: int) -> dict[str, Any]:
        images = {name: picture(n, 3, size, size) for name in names if "mask" not in name}
        masks = {name: (picture(n, 1, size, size) > 0.5).float() for name in names if "mask" in name}
        return call(n) | images | masks | more

    return arguments


def call_with(call: Call, **more: Any) -> Call:
    """The call with further arguments."""
    return lambda n: call(n) | more


def open_gates(transformer: Part) -> nn.Module:
    """An AuraFlow whose gates, which have no bias, let the prompt through."""
    made = transformer()
    made.time_step_proj.linear_2.weight.data *= 16
    return made


SD3_CALL = calls(IMAGE, **GUIDANCE, pooled=True)[0]
MASKED_CALL = calls(IMAGE, **GUIDANCE, **MASKED)[0]
PIXART_CALL = call_with(MASKED_CALL, **UNBINNED)
SANA_CALL = calls(SANA_SIZE | UNBINNED, **GUIDANCE, **MASKED)[0]
PRX_CALL = call_with(MASKED_CALL, **UNBINNED_PRX)
PLAIN_CALL = calls(IMAGE, **GUIDANCE)[0]


def sprint_call(n: int) -> dict[str, Any]:
    """A call with guidance as an input of the model."""
    own = prompt(n, **MASKED)
    return {**SANA_SIZE, "use_resolution_binning": False, "intermediate_timesteps": None, **GUIDED, **own}


def hunyuan_call(n: int) -> dict[str, Any]:
    """A call with the embeddings of two text encoders."""
    first = prompt(n, **MASKED) | {f"negative_{k}": v for k, v in prompt(NEGATIVE, **MASKED).items()}
    second = prompt(n + 100, **MASKED) | {f"negative_{k}": v for k, v in prompt(NEGATIVE + 100, **MASKED).items()}
    return {**FINE, "use_resolution_binning": False, **GUIDED, **first, **{f"{k}_2": v for k, v in second.items()}}


FLOW_MATCH = part("FlowMatchEulerDiscreteScheduler", shift=3.0)
EIGHTFOLD_VAE = changed(
    image_vae(),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(4,) * 4,
)
FINE_CALL = calls(FINE, **GUIDANCE, **MASKED)[0]

SD3_INPAINT_PARTS = SD3_PARTS | {
    "vae": changed(SD3_PARTS["vae"], latent_channels=16),
    "transformer": changed(SD3_PARTS["transformer"], in_channels=16, out_channels=16),
}
SD3_CONTROL = {
    **HEADS,
    **LATENTS,
    "sample_size": 8,
    "num_layers": 1,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 24,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}
SANA_CONTROLNET = part(
    "SanaControlNetModel",
    **HEADS,
    **LATENTS,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=TEXT,
    sample_size=4,
)
SPRINT_PARTS = SANA_PARTS | {
    "scheduler": part("SCMScheduler"),
    "transformer": changed(SANA_PARTS["transformer"], guidance_embeds=True, qk_norm="rms_norm_across_heads"),
}
HUNYUAN_DIT = {
    **HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "sample_size": 8,
    "hidden_size": 24,
    "mlp_ratio": 2.0,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": TEXT,
    "pooled_projection_dim": POOLED,
    "text_len": TOKENS,
    "text_len_t5": TOKENS,
    "use_style_cond_and_image_meta_size": True,
}
HUNYUAN_PARTS = {
    "transformer": part("HunyuanDiT2DModel", **HUNYUAN_DIT, num_layers=4, learn_sigma=True),
    "scheduler": part("DDPMScheduler", beta_end=0.002, prediction_type="v_prediction", clip_sample=False),
    "vae": EIGHTFOLD_VAE,
    "requires_safety_checker": False,
}
LUMINA_PARTS = {
    "transformer": part(
        "LuminaNextDiT2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT,
    ),
    "scheduler": FLOW_MATCH,
    "vae": EIGHTFOLD_VAE,
}
LUMINA2_PARTS = {
    "transformer": part(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(16, 8, 8),
        cap_feat_dim=TEXT,
    ),
    "scheduler": FLOW_MATCH,
    "vae": EIGHTFOLD_VAE,
}
AURA_FLOW = part(
    "AuraFlowTransformer2DModel",
    **HEADS,
    **LATENTS,
    sample_size=8,
    num_mmdit_layers=2,
    num_single_dit_layers=3,
    joint_attention_dim=TEXT,
    caption_projection_dim=24,
    pos_embed_max_size=64,
)
AURA_PARTS = {
    "transformer": functools.partial(open_gates, AURA_FLOW),
    "scheduler": FLOW_MATCH,
    "vae": image_vae(),
}
PRX = part(
    "PRXTransformer2DModel",
    in_channels=4,
    context_in_dim=TEXT,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=2,
    depth=3,
    axes_dim=[8, 8],
)
COG_VIEW = {
    **LATENTS,
    **HEADS,
    "num_layers": 3,
    "text_embed_dim": TEXT,
    "time_embed_dim": 24,
    "condition_dim": 8,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}
COG_VIEW4 = part("CogView4Transformer2DModel", **COG_VIEW | {"attention_head_dim": 16}, rope_axes_dim=(16, 16))
COG_VIEW4_PARTS = {
    "transformer": COG_VIEW4,
    "scheduler": part("FlowMatchEulerDiscreteScheduler", base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    "vae": image_vae(),
}


def case(name: str, parts: dict[str, Any], call: Call, **more: Any) -> PipelineCase:
    """A case whose pipeline is made of these parts, and of others."""
    return PipelineCase(name, maker(name, **parts | more), call)


CASES = (
    case("StableDiffusion3Pipeline", SD3_PARTS, SD3_CALL),
    case("StableDiffusion3Img2ImgPipeline", SD3_PARTS, with_images(SD3_CALL, "image", strength=0.6)),
    case(
        "StableDiffusion3InpaintPipeline",
        SD3_INPAINT_PARTS,
        with_images(SD3_CALL, "image", "mask_image", strength=0.6),
    ),
    case(
        "StableDiffusion3ControlNetPipeline",
        SD3_PARTS,
        with_images(SD3_CALL, "control_image", controlnet_conditioning_scale=0.7),
        controlnet=part("SD3ControlNetModel", **SD3_CONTROL),
    ),
    case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        SD3_PARTS,
        with_images(SD3_CALL, "control_image", "control_mask", controlnet_conditioning_scale=0.7),
        controlnet=part("SD3ControlNetModel", **SD3_CONTROL, extra_conditioning_channels=1),
    ),
    case("StableDiffusion3PAGPipeline", SD3_PARTS, call_with(SD3_CALL, **PAG)),
    case("StableDiffusion3PAGImg2ImgPipeline", SD3_PARTS, with_images(SD3_CALL, "image", strength=0.6, **PAG)),
    case("PixArtAlphaPipeline", PIXART_PARTS, PIXART_CALL),
    case("PixArtSigmaPipeline", PIXART_PARTS, PIXART_CALL),
    case("PixArtSigmaPAGPipeline", PIXART_PARTS, call_with(PIXART_CALL, **PAG)),
    case("SanaPipeline", SANA_PARTS, SANA_CALL),
    case(
        "SanaControlNetPipeline",
        SANA_PARTS,
        with_images(SANA_CALL, "control_image", size=32),
        controlnet=SANA_CONTROLNET,
    ),
    case("SanaPAGPipeline", SANA_PARTS, call_with(SANA_CALL, **PAG), scheduler=FLOW_MATCH),
    case("SanaSprintPipeline", SPRINT_PARTS, sprint_call),
    case("SanaSprintImg2ImgPipeline", SPRINT_PARTS, with_images(sprint_call, "image", size=32, strength=0.6)),
    case("HunyuanDiTPipeline", HUNYUAN_PARTS, hunyuan_call),
    case(
        "HunyuanDiTControlNetPipeline",
        HUNYUAN_PARTS,
        with_images(hunyuan_call, "control_image", size=64),
        controlnet=part("HunyuanDiT2DControlNetModel", **HUNYUAN_DIT, transformer_num_layers=4),
    ),
    case("HunyuanDiTPAGPipeline", HUNYUAN_PARTS, call_with(hunyuan_call, **PAG)),
    case("DiTPipeline", DIT_PARTS, lambda n: {"class_labels": [n % 1000], "output_type": "pt", **GUIDED}),
    case("LuminaPipeline", LUMINA_PARTS, FINE_CALL),
    case("Lumina2Pipeline", LUMINA2_PARTS, FINE_CALL),
    case("AuraFlowPipeline", AURA_PARTS, MASKED_CALL),
    case("PRXPipeline", {"transformer": PRX, "scheduler": FLOW_MATCH, "vae": image_vae()}, PRX_CALL),
    case(
        "PRXPixelPipeline",
        {"transformer": changed(PRX, in_channels=3), "scheduler": FLOW_MATCH},
        call_with(PRX_CALL, height=8, width=8),
    ),
    case(
        "CogView3PlusPipeline",
        {
            "transformer": part("CogView3PlusTransformer2DModel", **COG_VIEW),
            "scheduler": part("CogVideoXDDIMScheduler", prediction_type="v_prediction", timestep_spacing="trailing"),
            "vae": image_vae(),
        },
        PLAIN_CALL,
    ),
    case("CogView4Pipeline", COG_VIEW4_PARTS, PLAIN_CALL),
    case(
        "CogView4ControlPipeline",
        COG_VIEW4_PARTS,
        with_images(PLAIN_CALL, "control_image"),
        transformer=changed(COG_VIEW4, in_channels=8),
    ),
)
