"""Pipelines for audio, and of Helios, Hunyuan Video, Kandinsky, Proteina, SANA's videos and SkyReels."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from PIL import Image
from torch import Tensor

from tests.tiny_pipelines import (
    FLOW,
    GUIDANCE,
    HEADS,
    HUNYUAN_PARTS,
    LATENTS,
    MASKED,
    TEXT,
    TRUE_CFG,
    VIDEO_SIZE,
    WAN_SIZE,
    WAN_VAE,
    Call,
    Part,
    calls,
    maker,
    part,
)
from tests.zoo.audio_and_others import ACE_STEP, LONGCAT_AUDIO, RFD4_PROTEINA, STABLE_AUDIO, STABLE_AUDIO_3
from tests.zoo.base import Case, Draw
from tests.zoo.pipelines import ROUNDED, PipelineCase
from tests.zoo.videos_a_to_h import HELIOS
from tests.zoo.videos_k_to_z import KANDINSKY5, KANDINSKY6, KANDINSKY6_SR, SANA_VIDEO, SANA_WM, SANA_WM_REFINER


def _case(name: str, parts: dict[str, Any], call: Call, **more: Any) -> PipelineCase:
    """A case whose pipeline is made of these parts."""
    return PipelineCase(name, maker(name, **parts), call, **more)


def _changed(component: Part, **changes: Any) -> Part:
    """A component of the same class with some of its configuration changed."""
    name, config = component.args
    return part(name, **config | changes)


def _of(case: Case, **changes: Any) -> Part:
    """The transformer of the zoo of transformers."""
    return part(case.name, **{**case.config, **changes})


class _Tokenizer:
    """Makes six tokens of any text."""

    model_max_length = 6

    def __call__(self, text: str | list[str], **_: Any) -> transformers.BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        ids = [[(sum(map(ord, each)) * (k + 1)) % 97 + 1 for k in range(6)] for each in texts]
        mask = [[1] * 5 + [0] for _ in texts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def _normal(n: int, *shape: int) -> Tensor:
    """Standard normal values, drawn from a number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(n))


def _image(n: int, side: int) -> Image.Image:
    """A square picture of noise."""
    pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(n))
    return Image.fromarray(pixels.numpy().astype(np.uint8))


def _with(call: Call, **more: Callable[[int], Any] | Any) -> Call:
    """A call with more arguments; those that are functions get the number of the prompt."""
    return lambda n: call(n) | {name: value(n) if callable(value) else value for name, value in more.items()}


VISION: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
SIGLIP = functools.partial(
    lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, vision_use_head=False))
)
CLIP = functools.partial(
    lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=8))
)
SIGLIP_PROCESSOR = functools.partial(lambda: transformers.SiglipImageProcessor(size={"height": 32, "width": 32}))
CLIP_PROCESSOR = functools.partial(lambda: transformers.CLIPImageProcessor(size=32, crop_size=32))

FLOW_MATCH = part("FlowMatchEulerDiscreteScheduler", shift=5.0)

HUNYUAN_CALL = calls(VIDEO_SIZE, **TRUE_CFG, **MASKED, pooled=True)[0]
HUNYUAN_FRAMEPACK = part(
    "HunyuanVideoFramepackTransformer3DModel",
    **HUNYUAN_PARTS["transformer"].args[1],
    has_image_proj=True,
    image_proj_dim=12,
    has_clean_x_embedder=True,
)
HUNYUAN_15_PARTS = {
    "transformer": part(
        "HunyuanVideo15Transformer3DModel",
        **HEADS,
        in_channels=9,
        out_channels=4,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        text_embed_2_dim=20,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 4),
        target_size=16,
    ),
    "scheduler": FLOW_MATCH,
    "vae": part(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ),
    "guider": part("ClassifierFreeGuidance", guidance_scale=4.0),
}


def _hunyuan_15_text(n: int, longest: int = 5) -> dict[str, Any]:
    """The two texts of a prompt, each with its mask; all are as long unless the longest is of another length."""
    mask = (torch.arange(6) < longest - (longest != 5) * n % 3)[None].float()
    return {
        "prompt_embeds": _normal(n, 1, 6, TEXT),
        "prompt_embeds_mask": mask,
        "prompt_embeds_2": _normal(n + 1, 1, 4, 20),
        "prompt_embeds_mask_2": mask[:, :4],
    }


def _hunyuan_15(n: int, longest: int = 5) -> dict[str, Any]:
    negative = {f"negative_{k}": v for k, v in _hunyuan_15_text(998, longest).items()}
    return _hunyuan_15_text(n, longest) | negative | {"num_frames": 5, "height": 16, "width": 16}


def _with_one_image(change: int) -> Call:
    """A call for prompts that have one image, or others."""
    sized = {"height", "width"}
    return lambda n: {
        **{name: value for name, value in _hunyuan_15(n).items() if name not in sized},
        "image": _image(n * change, 16),
    }


HUNYUAN_15_I2V = HUNYUAN_15_PARTS | {"image_encoder": SIGLIP, "feature_extractor": SIGLIP_PROCESSOR}

HUNYUAN_CASES = (
    _case("HunyuanVideoPipeline", HUNYUAN_PARTS, _with(HUNYUAN_CALL, guidance_scale=5.0)),
    _case(
        "HunyuanVideoImageToVideoPipeline",
        HUNYUAN_PARTS
        | {"transformer": _changed(HUNYUAN_PARTS["transformer"], in_channels=9, image_condition_type="latent_concat")},
        _with(HUNYUAN_CALL, image=lambda n: _image(n, 64)),
    ),
    _case(
        "HunyuanSkyreelsImageToVideoPipeline",
        HUNYUAN_PARTS | {"transformer": _changed(HUNYUAN_PARTS["transformer"], in_channels=8)},
        _with(HUNYUAN_CALL, image=lambda n: _image(n, 64)),
    ),
    _case(
        "HunyuanVideoFramepackPipeline",
        HUNYUAN_PARTS
        | {
            "transformer": HUNYUAN_FRAMEPACK,
            "scheduler": part("FlowMatchEulerDiscreteScheduler", shift=7.0, use_dynamic_shifting=True),
            "image_encoder": SIGLIP,
            "feature_extractor": SIGLIP_PROCESSOR,
        },
        _with(HUNYUAN_CALL, image=lambda n: _image(n, 64), latent_window_size=2),
    ),
    _case("HunyuanVideo15Pipeline", HUNYUAN_15_PARTS, _hunyuan_15),
    _case(
        "HunyuanVideo15Pipeline",
        HUNYUAN_15_PARTS,
        lambda n: _hunyuan_15(n, 6),
        variant="a prompt of another length",
        refused="the values of 'encoder_attention_mask', 'encoder_attention_mask_2', 'image_embeds' are not those",
    ),
    _case(
        "HunyuanVideo15ImageToVideoPipeline",
        HUNYUAN_15_I2V,
        _with_one_image(0),
    ),
    _case(
        "HunyuanVideo15ImageToVideoPipeline",
        HUNYUAN_15_I2V,
        _with_one_image(1),
        variant="another image",
        refused="'image_embeds' are not those",
    ),
)

SKYREELS = part(
    "SkyReelsV2Transformer3DModel",
    **HEADS,
    **LATENTS,
    text_dim=TEXT,
    freq_dim=16,
    ffn_dim=32,
    num_layers=3,
    rope_max_seq_len=16,
)
SKYREELS_PARTS = {"transformer": SKYREELS, "scheduler": part("UniPCMultistepScheduler", **FLOW), "vae": WAN_VAE}
FORCING_PARTS = SKYREELS_PARTS | {"transformer": _changed(SKYREELS, inject_sample_info=True)}
SKYREELS_CALL = calls(WAN_SIZE, **GUIDANCE)[0]

SKYREELS_CASES = (
    _case("SkyReelsV2Pipeline", SKYREELS_PARTS, SKYREELS_CALL),
    _case(
        "SkyReelsV2ImageToVideoPipeline",
        SKYREELS_PARTS
        | {
            "transformer": _changed(SKYREELS, in_channels=12, image_dim=12, added_kv_proj_dim=24),
            "image_encoder": CLIP,
            "image_processor": CLIP_PROCESSOR,
        },
        # With an image the attention takes the last 512 tokens for the text.
        _with(
            SKYREELS_CALL,
            image=lambda n: _image(n, 32),
            prompt_embeds=lambda n: _normal(n, 1, 512, TEXT),
            negative_prompt_embeds=_normal(997, 1, 512, TEXT),
        ),
    ),
    _case("SkyReelsV2DiffusionForcingPipeline", FORCING_PARTS, _with(SKYREELS_CALL, prompt=None)),
    _case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        FORCING_PARTS,
        _with(SKYREELS_CALL, image=lambda n: _image(n, 32)),
    ),
    _case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        FORCING_PARTS,
        _with(
            SKYREELS_CALL,
            video=lambda n: [_image(8 * n + frame, 32) for frame in range(5)],
            num_frames=9,
            base_num_frames=9,
            overlap_history=5,
        ),
    ),
)


def _kandinsky_text(n: int) -> dict[str, Any]:
    """The two texts of a prompt for Kandinsky 5."""
    return {
        "prompt_embeds_qwen": _normal(n, 1, 6, 24),
        "prompt_embeds_clip": _normal(n + 1, 1, 12),
        "prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
    }


def _kandinsky5(n: int) -> dict[str, Any]:
    negative = {f"negative_{k}": v for k, v in _kandinsky_text(997).items()}
    return _kandinsky_text(n) | negative | {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.5}


def _kandinsky6(n: int) -> dict[str, Any]:
    return {
        "prompt_embeds": _normal(n, 1, 6, 24),
        "pooled_prompt_embeds": _normal(n + 1, 1, 12),
        "negative_prompt_embeds": _normal(997, 1, 6, 24),
        "negative_pooled_prompt_embeds": _normal(998, 1, 12),
        "image": _image(n, 32),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }


KANDINSKY_PARTS = {"transformer": _of(KANDINSKY5), "scheduler": FLOW_MATCH, "vae": HUNYUAN_PARTS["vae"]}
KANDINSKY6_PARTS = KANDINSKY_PARTS | {
    "transformer": _of(KANDINSKY6),
    "audio_vae": part(
        "MMAudioVAE",
        mel_bins=8,
        latent_channels=6,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=192,
        n_fft=16,
        hop_length=4,
    ),
    "vocoder": part(
        "MMAudioVocoder",
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    ),
}
KANDINSKY6_SR_PARTS = {
    "transformer": _of(KANDINSKY6_SR, tile_sizes=((32, 32),)),
    "scheduler": FLOW_MATCH,
    "vae": part(
        "Kandinsky6SRVAE",
        latent_channels=4,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        layers_per_block=1,
        temporal_compression_ratio=4,
        temporal_compression_start_level=0,
    ),
}

KANDINSKY_CASES = (
    _case("Kandinsky5T2VPipeline", KANDINSKY_PARTS, _kandinsky5, exact=ROUNDED),
    _case(
        "Kandinsky5I2VPipeline",
        KANDINSKY_PARTS,
        # The first four frames are normalized to those after them.
        _with(_kandinsky5, image=lambda n: _image(n, 32), num_frames=21),
        exact=ROUNDED,
    ),
    _case("Kandinsky6TI2VAPipeline", KANDINSKY6_PARTS, _kandinsky6),
    _case(
        "Kandinsky6SRPipeline",
        KANDINSKY6_SR_PARTS,
        lambda n: {
            "video": torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(n)),
            "resolution_scale": 2,
            "output_type": "pt",
        },
    ),
)

HELIOS_PARTS = {
    "transformer": _of(HELIOS),
    "scheduler": part("HeliosScheduler", stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
    "vae": _changed(WAN_VAE, scale_factor_temporal=4),
}
HELIOS_CALL = _with(
    calls(WAN_SIZE, **GUIDANCE)[0],
    num_latent_frames_per_chunk=2,
    prompt_embeds=lambda n: _normal(n, 1, 6, 24),
    negative_prompt_embeds=_normal(997, 1, 6, 24),
)

HELIOS_CASES = (
    _case("HeliosPipeline", HELIOS_PARTS, HELIOS_CALL),
    _case(
        "HeliosPyramidPipeline",
        HELIOS_PARTS | {"scheduler": part("HeliosScheduler", gamma=0.3, use_dynamic_shifting=True)},
        _with(HELIOS_CALL, height=64, width=64, pyramid_num_inference_steps_list=[6, 6, 6]),
        steps="pyramid_num_inference_steps_list",
        refused="it has stages with timetables of their own",
    ),
)

STABLE_AUDIO_PARTS = {
    "transformer": _of(STABLE_AUDIO),
    "scheduler": part(
        "EDMDPMSolverMultistepScheduler",
        prediction_type="v_prediction",
        sigma_schedule="exponential",
        sigma_data=1.0,
        sigma_min=0.3,
        sigma_max=50.0,
    ),
    "vae": part(
        "AutoencoderOobleck",
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=8,
        channel_multiples=[1, 2],
        sampling_rate=4,
    ),
    "projection_model": part(
        "StableAudioProjectionModel", text_encoder_dim=24, conditioning_dim=24, min_value=0, max_value=32
    ),
}
STABLE_AUDIO_3_PARTS = {
    "transformer": _of(STABLE_AUDIO_3),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1, shift=1.0),
    "vae": part(
        "AutoencoderSAME",
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    ),
    "duration_embedder": part("StableAudio3DurationEmbedder", output_dim=24, fourier_dim=16),
}


def _stable_audio_3(n: int) -> dict[str, Any]:
    """4 seconds are 16 latents."""
    return {
        "prompt_embeds": _normal(n, 1, 6, 24),
        "encoder_attention_mask": (torch.arange(6) < 5 - n % 3)[None].long(),
        "duration": 4.0,
    }


def _waveform(n: int) -> Tensor:
    return _normal(n, 1, 2, 64)


def _stable_audio(n: int) -> dict[str, Any]:
    return {
        "prompt_embeds": _normal(n, 1, 6, 24),
        "attention_mask": (torch.arange(6) < 5 - n % 3)[None].long(),
        "negative_prompt_embeds": _normal(997, 1, 6, 24),
        "negative_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "audio_end_in_s": 8.0,
        "guidance_scale": 4.0,
    }


NEGATIVE_AUDIO: dict[str, Any] = {
    "negative_prompt_embeds": _normal(997, 1, 6, 24),
    "negative_encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64),
    "guidance_scale": 4.0,
}
TEXT_MODEL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
QWEN = functools.partial(lambda: transformers.Qwen3Model(transformers.Qwen3Config(**TEXT_MODEL)))
T5 = functools.partial(
    lambda: transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=100, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
)
ACE_STEP_PARTS = {
    "transformer": _of(ACE_STEP),
    "condition_encoder": part(
        "AceStepConditionEncoder",
        hidden_size=24,
        intermediate_size=32,
        text_hidden_dim=24,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
    ),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1, shift=1.0),
    "vae": STABLE_AUDIO_PARTS["vae"],
    "text_encoder": QWEN,
    "tokenizer": functools.partial(_Tokenizer),
}
LONGCAT_PARTS = {
    "transformer": _of(LONGCAT_AUDIO),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", shift=1.0, invert_sigmas=True),
    "vae": part(
        "LongCatAudioDiTVae",
        channels=4,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=4,
    ),
    "text_encoder": T5,
    "tokenizer": functools.partial(_Tokenizer),
}

AUDIO_CASES = (
    _case("StableAudioPipeline", STABLE_AUDIO_PARTS, _stable_audio),
    _case("StableAudio3Pipeline", STABLE_AUDIO_3_PARTS, _with(_stable_audio_3, **NEGATIVE_AUDIO)),
    _case(
        "StableAudio3AudioToAudioPipeline",
        STABLE_AUDIO_3_PARTS,
        _with(_stable_audio_3, audio=_waveform, init_noise_level=0.8),
    ),
    _case(
        "StableAudio3InpaintPipeline",
        STABLE_AUDIO_3_PARTS,
        _with(_stable_audio_3, audio=_waveform, mask_start_seconds=1.0, mask_end_seconds=3.0),
    ),
    _case(
        "AceStepPipeline",
        ACE_STEP_PARTS,
        lambda n: {"prompt": f"piano {n}", "lyrics": f"la {n}", "audio_duration": 8.0, "guidance_scale": 4.0},
    ),
    _case(
        "LongCatAudioDiTPipeline",
        LONGCAT_PARTS,
        lambda n: {
            "prompt": f"ocean {n}",
            "negative_prompt": "noise",
            "audio_duration_s": 8.0,
            "guidance_scale": 4.0,
        },
    ),
)

SANA_VIDEO_PARTS = {
    "transformer": _of(SANA_VIDEO, caption_channels=TEXT),
    "scheduler": part("DPMSolverMultistepScheduler", **FLOW),
    "vae": WAN_VAE,
}
SANA_VIDEO_CALL = calls(
    {"height": 32, "width": 32, "frames": 9, "use_resolution_binning": False, "negative_prompt": None},
    **GUIDANCE,
    **MASKED,
)[0]
LTX2_VAE = part(
    "AutoencoderKLLTX2Video",
    latent_channels=8,
    block_out_channels=(8, 8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    layers_per_block=(1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1),
    spatial_compression_ratio=32,
    temporal_compression_ratio=8,
)


def _sana_wm(n: int) -> dict[str, Any]:
    mask = torch.ones(1, 6, dtype=torch.int64)
    return {
        "image": _image(n, 64),
        "prompt": "",
        "action": "w-10,a-10",
        "intrinsics": [60.0, 60.0, 32.0, 32.0],
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "guidance_scale": 4.0,
        "prompt_embeds": _normal(n, 1, 1, 6, 24),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": _normal(997, 1, 1, 6, 24),
        "negative_prompt_attention_mask": mask,
    }


REFINER_PARTS = {
    "transformer": _of(SANA_WM_REFINER),
    "connectors": functools.partial(
        LTX2TextConnectors,
        caption_channels=24,
        text_proj_in_factor=3,
        **{
            f"{stream}_connector_{name}": value
            for stream in ("video", "audio")
            for name, value in (HEADS | {"num_layers": 1, "num_learnable_registers": 6}).items()
        },
    ),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", shift=1.0),
    "text_encoder": QWEN,
    "tokenizer": functools.partial(_Tokenizer),
}

SANA_CASES = (
    _case("SanaVideoPipeline", SANA_VIDEO_PARTS, SANA_VIDEO_CALL),
    _case(
        "SanaImageToVideoPipeline",
        SANA_VIDEO_PARTS | {"scheduler": FLOW_MATCH},
        _with(SANA_VIDEO_CALL, image=lambda n: _image(n, 32)),
    ),
    _case(
        "SanaWMPipeline",
        {
            "transformer": _of(SANA_WM, chunk_plucker_channels=48),
            "scheduler": FLOW_MATCH,
            "vae": LTX2_VAE,
        },
        _sana_wm,
    ),
    _case(
        "SanaWMLTX2Refiner",
        REFINER_PARTS,
        lambda n: {
            "sana_latent": _normal(n, 1, 8, 4, 2, 2),
            "prompt": f"desert {n}",
            "fps": 16,
            "sigmas": (0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.0),
        },
        steps="sigmas",
        refused="it writes to an object among its arguments",
    ),
)


def _proteina(n: int) -> dict[str, Any]:
    """Masks and conditions as the transformer takes them, and the residues that are given: none."""
    inputs = RFD4_PROTEINA.inputs(Draw(n))
    conditioning = inputs["conditioning"]
    arguments = ("padding_mask", "token_type", "atom37_mask")
    masks = ("is_in_context_conditioning", "supports_local_latent")
    return {
        **{name: inputs[name] for name in arguments},
        **{name: conditioning[name] for name in masks},
        "conditioning_features": {
            **{name: value for name, value in conditioning.items() if name not in masks},
            "condition_sequence_1_residue": torch.zeros(1, 8, dtype=torch.int64),
        },
        "num_designs_per_prompt": 1,
        "output_type": "pt",
    }


PROTEINA_SCHEDULER: dict[str, Any] = {"noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0, "tail_steps": 0}
PROTEINA_CASES = (
    _case(
        "RFD4ProteinaPipeline",
        {
            "transformer": _of(RFD4_PROTEINA),
            "vae": part(
                "RFD4ProteinaAutoencoder",
                atom37_mask=[[True] * 37] * 10,
                allowed_residue_types=[[True] * 10] * 7,
                latent_dim=4,
                n_residue_types=10,
                nlayers=1,
                token_dim=16,
                nheads=2,
                dim_cond=8,
                pair_repr_dim=8,
                token_type_emb_dim=8,
            ),
            "bb_ca_scheduler": part("RFD4ProteinaScheduler", schedule_mode="log", **PROTEINA_SCHEDULER),
            "local_latents_scheduler": part("RFD4ProteinaScheduler", schedule_mode="power", **PROTEINA_SCHEDULER),
            "recycle_depths": (2,) * 6,
        },
        _proteina,
        steps="num_designs_per_prompt",  # the number of steps is in the configuration
        refused="has no scheduler that tells its step",
    ),
)

CASES = (*HUNYUAN_CASES, *SKYREELS_CASES, *KANDINSKY_CASES, *HELIOS_CASES, *AUDIO_CASES, *SANA_CASES, *PROTEINA_CASES)
