"""Pipelines of video models, from LTX to Wan."""

import functools
from typing import Any

import torch
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny_pipelines import (
    GUIDANCE,
    HEADS,
    LTX_PARTS,
    LTX_SIZE,
    MASKED,
    MILD,
    TEXT,
    TOKENS,
    TWO_GUIDANCES,
    WAN_PARTS,
    WAN_SIZE,
    WAN_TRANSFORMER,
    Call,
    Part,
    calls,
    image_vae,
    maker,
    part,
)
from tests.zoo import videos_k_to_z as transformers_of
from tests.zoo.pipelines import PipelineCase

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGE_TEXT = 512  # tokens of a prompt where Wan gets an image, too: it takes the last 512 for the text


def picture(n: int, size: int, frames: int = 1) -> Tensor:
    """Images for prompt number n, values from 0 to 1."""
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(n))


def clip(n: int, size: int, frames: int) -> list[Image.Image]:
    """A video for prompt number n."""
    pixels = (picture(n, size, frames) * 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(frame) for frame in pixels]


class Tokenizer:
    """Makes the letters of a text its tokens, always as many."""

    model_max_length = TOKENS

    def __call__(self, text: list[str], **_: Any) -> Any:
        """The identifiers of the tokens and the mask that leaves out the padding."""
        padded = [each[:TOKENS].ljust(TOKENS, "\0") for each in text]
        ids = torch.tensor([[ord(letter) % 64 for letter in each] for each in padded])
        return _Tokens(input_ids=ids, attention_mask=(ids > 0).long())

    def batch_decode(self, ids: Tensor) -> list[str]:
        """Texts, of what was cut off."""
        return ["" for _ in ids]


class _Tokens(dict[str, Tensor]):
    __getattr__ = dict.__getitem__


class TextEncoder(nn.Module):
    """Embeds each token by itself; with a tower for images, if it is given one."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, width: int = TEXT, vision_tower: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.vision_tower = vision_tower

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        """The embeddings."""
        return (self.embedding(input_ids),)


def _clip_vision() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=16, patch_size=8))


def _siglip() -> nn.Module:
    return TextEncoder(vision_tower=SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=16, patch_size=8)))


def _guided(call: Call, **more: Any) -> Call:
    """A call with arguments that are made of the prompt's number, or are the same for all."""
    return lambda n: call(n) | {name: each(n) if callable(each) else each for name, each in more.items()}


def _with_image(call: Call) -> Call:
    """A call whose embeddings are as long as Wan expects where there is an image, too."""

    def arguments(n: int) -> dict[str, Any]:
        given = call(n)
        texts = {name: value for name, value in given.items() if name.endswith("prompt_embeds")}
        return given | {name: value.repeat(1, 86, 1)[:, :IMAGE_TEXT] for name, value in texts.items()}

    return arguments


def _animate(frames: int) -> Call:
    """A call for a video of so many frames, in segments of 5 that overlap by one."""
    size = {"height": 32, "width": 32, "segment_frame_length": 5}
    return _guided(
        _with_image(calls(size, **GUIDANCE)[0]),
        image=lambda n: clip(n, 32, 1)[0],
        pose_video=lambda n: clip(n + 5, 32, frames),
        face_video=lambda n: clip(n + 9, 16, frames),
    )


def _long(n: int) -> dict[str, Any]:
    """A call for windows of two frames of latents that overlap by one, each with a prompt of its own."""
    windows = {"temporal_tile_size": 16, "temporal_overlap": 8}
    texts = {"prompt": "a cat|a dog"[n % 4 :], "negative_prompt": "bad", "guidance_scale": 4.0}
    return LTX_SIZE | windows | texts | {"cond_image": picture(n, 128)}


def _changed(made: Part, **config: Any) -> Part:
    """A component with another configuration."""
    name, old = made.args
    return part(name, **old | config)


PROCESSOR = functools.partial(CLIPImageProcessor, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
CLIP_PARTS = {"image_encoder": functools.partial(_clip_vision), "image_processor": PROCESSOR}

WAN = calls(WAN_SIZE, **GUIDANCE)[0]
WAN_PAIR = {"transformer_2": WAN_TRANSFORMER, "boundary_ratio": 0.875}
WAN_2 = calls(WAN_SIZE, **TWO_GUIDANCES)[0]
I2V_TRANSFORMER = _changed(WAN_TRANSFORMER, in_channels=12)  # latents, a mask for each frame, latents of the image
I2V_PAIR = {"transformer": I2V_TRANSFORMER, "transformer_2": I2V_TRANSFORMER, "boundary_ratio": 0.875}
VACE = part("WanVACETransformer3DModel", **WAN_TRANSFORMER.args[1], vace_layers=[0, 2], vace_in_channels=24)
ANIMATE = part(
    "WanAnimateTransformer3DModel",
    **transformers_of.WAN_ANIMATE.config | HEADS | {"text_dim": TEXT, "ffn_dim": 32, "added_kv_proj_dim": 24},
)
LTX = calls(LTX_SIZE, **GUIDANCE, **MASKED)[0]
FLOW_EULER = part("FlowMatchEulerDiscreteScheduler")
LONG_PARTS = LTX_PARTS | {
    "scheduler": part("LTXEulerAncestralRFScheduler"),
    "tokenizer": Tokenizer(),
    "text_encoder": functools.partial(TextEncoder),
}
LATTE_PARTS = {
    "transformer": part(
        "LatteTransformer3DModel",
        **transformers_of.LATTE.config
        | HEADS
        | {"cross_attention_dim": 24, "caption_channels": TEXT, "sample_size": 8},
    ),
    "scheduler": part("DDIMScheduler", clip_sample=False, **MILD),
    "vae": image_vae(),
}
MOCHI_PARTS = {
    "transformer": part("MochiTransformer3DModel", **transformers_of.MOCHI.config | {"text_embed_dim": TEXT}),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
}
MOCHI_SIZE = {"height": 64, "width": 64, "num_frames": 7}
MOTIF_PARTS = {
    "scheduler": FLOW_EULER,
    "vae": WAN_PARTS["vae"],
    "guider": part("ClassifierFreeGuidance", guidance_scale=4.0),
}
MOTIF = transformers_of.MOTIF_VIDEO.config | {"text_embed_dim": TEXT}
MOTIF_CALL = calls(WAN_SIZE, guided={}, unguided={}, **MASKED)[0]

# video latents of 3x4x4 tokens, audio latents of 5; the text's embeddings go through the connectors
LTX2 = transformers_of.LTX2_VIDEO.config | dict.fromkeys(
    ("in_channels", "out_channels", "audio_in_channels", "audio_out_channels"), 4
)
LTX2_CONNECTORS = functools.partial(
    LTX2TextConnectors,
    caption_channels=TEXT,
    text_proj_in_factor=1,
    per_modality_projections=True,
    rope_type="split",
    **{
        f"{modality}_{name}": value
        for modality, width in (("video", 32), ("audio", 16))
        for name, value in {
            "hidden_dim": width,
            "connector_num_attention_heads": 2,
            "connector_attention_head_dim": width // 2,
            "connector_num_layers": 1,
            "connector_num_learnable_registers": 3,
        }.items()
    },
)
LTX2_VAE = part(
    "AutoencoderKLLTX2Video",
    latent_channels=4,
    block_out_channels=(8,),
    decoder_block_out_channels=(8,),
    layers_per_block=(1,),
    decoder_layers_per_block=(1, 1),
    spatio_temporal_scaling=(True,),
    decoder_spatio_temporal_scaling=(True,),
    decoder_inject_noise=(False, False),
    downsample_type=("spatiotemporal",),
    upsample_residual=(False,),
    upsample_factor=(1,),
    patch_size=4,
)
AUDIO_VAE = part(
    "AutoencoderKLLTX2Audio",
    base_channels=4,
    ch_mult=(1,),
    num_res_blocks=1,
    in_channels=2,
    output_channels=2,
    latent_channels=2,
    mid_block_add_attention=False,
    mel_bins=8,
)
LTX2_PARTS = {
    "transformer": part("LTX2VideoTransformer3DModel", **LTX2),
    "connectors": LTX2_CONNECTORS,
    "vae": LTX2_VAE,
    "audio_vae": AUDIO_VAE,
    "scheduler": LTX_PARTS["scheduler"],
}
DFR_PARTS = LTX2_PARTS | {
    "transformer": part(
        "LTX2VideoTransformer3DModel", **LTX2, vae_scale_factors=(2, 8, 8), use_keyframes_abs_pos_embedding=True
    ),
    "scheduler": FLOW_EULER,
}
REFINE_PARTS = DFR_PARTS | {
    "scheduler": part("LTXEulerAncestralRFScheduler", eta=0.5),
    "temporal_latent_upsampler": functools.partial(
        LTX2LatentUpsamplerModel,
        in_channels=4,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
    ),
}
LTX2_SIZE = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0}
LTX2_CALL = calls(LTX2_SIZE, **GUIDANCE, **MASKED)[0]
ALL_GUIDANCES = {"spatio_temporal_guidance_blocks": [1]}  # and one without each other's modality, by default
ONE_GUIDANCE = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
SIGMAS = [1.0, 0.9, 0.8, 0.6, 0.4, 0.2]
DFR_CALL = calls(LTX2_SIZE | {"num_frames": 9, "sigmas": SIGMAS}, guided={}, unguided={}, **MASKED)[1]


def _refine(keyframes: int) -> Call:
    """A call for the latents of a video with a keyframe each 8 frames."""
    frames = 4 * keyframes + 1
    return _guided(
        DFR_CALL,
        num_frames=8 * keyframes + 1,
        latents=lambda n: picture(n, 4, 4 * frames)[:, 0].view(1, 4, frames, 4, 4),
        keyframes_latents=lambda n: picture(n, 4, 4 * keyframes)[:, 0].view(1, 4, keyframes, 4, 4),
        keyframe_positions=list(range(8, 8 * keyframes + 1, 8)),
        audio_latents=lambda n: picture(n, 8)[0, :1].view(1, 2, -1, 2)[:, :, : 8 * keyframes],
        sigmas=[0.9 * sigma for sigma in SIGMAS],
    )


CASES = (
    PipelineCase("WanPipeline", maker("WanPipeline", **WAN_PARTS), WAN),
    PipelineCase("WanPipeline", maker("WanPipeline", **WAN_PARTS, **WAN_PAIR), WAN_2, variant="two transformers"),
    PipelineCase(
        "WanPipeline", maker("WanPipeline", **WAN_PARTS, expand_timesteps=True), WAN, variant="a timestep each token"
    ),
    PipelineCase(
        "WanImageToVideoPipeline",
        maker(
            "WanImageToVideoPipeline",
            **WAN_PARTS | {"transformer": _changed(I2V_TRANSFORMER, image_dim=24, added_kv_proj_dim=24)},
            **CLIP_PARTS,
        ),
        _guided(_with_image(WAN), image=lambda n: clip(n, 32, 1)[0]),
    ),
    PipelineCase(
        "WanImageToVideoPipeline",
        maker("WanImageToVideoPipeline", **WAN_PARTS | I2V_PAIR),
        _guided(WAN_2, image=lambda n: picture(n, 32), last_image=lambda n: picture(n + 9, 32)),
        variant="two transformers, first and last image",
    ),
    PipelineCase(
        "WanImageToVideoPipeline",
        maker("WanImageToVideoPipeline", **WAN_PARTS, expand_timesteps=True),
        _guided(WAN, image=lambda n: picture(n, 32)),
        variant="a timestep each token",
    ),
    PipelineCase(
        "WanVACEPipeline",
        maker("WanVACEPipeline", **WAN_PARTS | {"transformer": VACE}),
        _guided(WAN, video=lambda n: clip(n, 32, 5), mask=lambda n: clip(n + 9, 32, 5)),
    ),
    PipelineCase(
        "WanVACEPipeline",
        maker("WanVACEPipeline", **WAN_PARTS | {"transformer": VACE}),
        _guided(WAN, reference_images=lambda n: clip(n, 32, 1)),
        variant="a reference image",
    ),
    PipelineCase(
        "WanVideoToVideoPipeline",
        maker("WanVideoToVideoPipeline", **WAN_PARTS),
        _guided(calls({"height": 32, "width": 32, "strength": 0.6}, **GUIDANCE)[0], video=lambda n: clip(n, 32, 5)),
    ),
    *(
        PipelineCase(
            "WanAnimatePipeline",
            maker("WanAnimatePipeline", **WAN_PARTS | {"transformer": ANIMATE}, **CLIP_PARTS),
            _animate(frames),
            variant=variant,
        )
        for frames, variant in ((5, ""), (9, "two segments"))
    ),
    PipelineCase("LTXPipeline", maker("LTXPipeline", **LTX_PARTS), LTX),
    PipelineCase(
        "LTXImageToVideoPipeline",
        maker("LTXImageToVideoPipeline", **LTX_PARTS),
        _guided(LTX, image=lambda n: picture(n, 128)),
    ),
    PipelineCase(
        "LTXConditionPipeline",
        maker("LTXConditionPipeline", **LTX_PARTS | {"scheduler": FLOW_EULER}),
        _guided(LTX, image=lambda n: clip(n, 128, 1)[0]),
    ),
    *(
        PipelineCase(
            "LTXI2VLongMultiPromptPipeline",
            maker("LTXI2VLongMultiPromptPipeline", **LONG_PARTS),
            _guided(_long, num_frames=frames),
            variant=variant,
        )
        for frames, variant in ((9, ""), (17, "two windows"))
    ),
    PipelineCase(
        "LattePipeline",
        maker("LattePipeline", **LATTE_PARTS),
        calls({"height": 16, "width": 16, "video_length": 3, "negative_prompt": None}, **GUIDANCE)[0],
    ),
    PipelineCase(
        "LucyEditPipeline",
        maker("LucyEditPipeline", **WAN_PARTS | {"transformer": _changed(WAN_TRANSFORMER, in_channels=8)}),
        _guided(WAN, video=lambda n: clip(n, 32, 5)),
    ),
    PipelineCase(
        "MochiPipeline",
        maker("MochiPipeline", **MOCHI_PARTS),
        calls(MOCHI_SIZE, **GUIDANCE, **MASKED)[0],
        refused="the values of 'encoder_attention_mask' are not those compiled",
        variant="a prompt of another length",
    ),
    PipelineCase(
        "MochiPipeline",
        maker("MochiPipeline", **MOCHI_PARTS),
        calls(MOCHI_SIZE, **GUIDANCE, **MASKED, padding=False)[0],
    ),
    PipelineCase(
        "MotifVideoPipeline",
        maker("MotifVideoPipeline", **MOTIF_PARTS, transformer=part("MotifVideoTransformer3DModel", **MOTIF)),
        MOTIF_CALL,
    ),
    PipelineCase(
        "MotifVideoImage2VideoPipeline",
        maker(
            "MotifVideoImage2VideoPipeline",
            **MOTIF_PARTS,
            transformer=part("MotifVideoTransformer3DModel", **MOTIF, image_embed_dim=24),
            text_encoder=functools.partial(_siglip),
            feature_extractor=functools.partial(SiglipImageProcessor, size={"height": 16, "width": 16}),
        ),
        _guided(MOTIF_CALL, prompt=None, image=lambda n: picture(n, 32)),
    ),
    PipelineCase("LTX2Pipeline", maker("LTX2Pipeline", **LTX2_PARTS), _guided(LTX2_CALL, **ONE_GUIDANCE)),
    PipelineCase(
        "LTX2Pipeline",
        maker("LTX2Pipeline", **LTX2_PARTS),
        _guided(LTX2_CALL, **ALL_GUIDANCES),
        variant="guidance of all kinds",
    ),
    PipelineCase(
        "LTX2ImageToVideoPipeline",
        maker("LTX2ImageToVideoPipeline", **LTX2_PARTS),
        _guided(LTX2_CALL, **ONE_GUIDANCE, image=lambda n: picture(n, 32), image_crf=0),
    ),
    PipelineCase(
        "LTX2ConditionPipeline",
        maker("LTX2ConditionPipeline", **LTX2_PARTS),
        _guided(LTX2_CALL, **ONE_GUIDANCE, conditions=lambda n: LTX2VideoCondition(clip(n, 32, 1)[0], crf=0)),
    ),
    PipelineCase(
        "LTX2InContextPipeline",
        maker("LTX2InContextPipeline", **LTX2_PARTS),
        _guided(LTX2_CALL, **ONE_GUIDANCE, reference_conditions=lambda n: LTX2ReferenceCondition(clip(n, 32, 5))),
    ),
    PipelineCase(
        "LTX2HDRPipeline",
        maker("LTX2HDRPipeline", **LTX2_PARTS),
        _guided(
            LTX2_CALL,
            reference_conditions=lambda n: LTX2HDRReferenceCondition(clip(n, 32, 5)),
        ),
    ),
    PipelineCase("LTX2DFRPipeline", maker("LTX2DFRPipeline", **DFR_PARTS), DFR_CALL, steps="sigmas"),
    *(
        PipelineCase(
            "LTX2DFRTemporalRefinePipeline",
            maker("LTX2DFRTemporalRefinePipeline", **REFINE_PARTS),
            _refine(keyframes),
            steps="sigmas",
            variant=variant,
        )
        for keyframes, variant in ((1, ""), (2, "two tiles"))
    ),
)
