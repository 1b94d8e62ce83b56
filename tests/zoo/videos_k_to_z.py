"""Transformers of video models, from Kandinsky to Wan."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
    SanaWMRefinerKVCache,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.zoo.base import Case, Draw

WAN = Case(
    "WanTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
    },
)

LTX_VIDEO = Case(
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
        "num_frames": 3,
        "height": 2,
        "width": 2,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    },
)


def _ltx2_inputs(draw: Draw) -> dict[str, Any]:
    timestep = torch.tensor([700.0])
    mask = torch.ones(1, 6, dtype=torch.int64)
    video = LTX2AudioVideoRotaryPosEmbed(32)
    audio = LTX2AudioVideoRotaryPosEmbed(16, scale_factors=(4,), modality="audio")
    return {
        "hidden_states": draw.normal(1, 12, 8),
        "audio_hidden_states": draw.normal(1, 5, 8),
        "encoder_hidden_states": draw.normal(1, 6, 32),
        "audio_encoder_hidden_states": draw.normal(1, 6, 16),
        "timestep": timestep,
        "sigma": timestep,  # the pipeline passes one tensor twice
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 3,
        "height": 2,
        "width": 2,
        "fps": 24.0,
        "audio_num_frames": 5,
        "video_coords": video.prepare_video_coords(1, 3, 2, 2, torch.device("cpu"), fps=24.0),
        "audio_coords": audio.prepare_audio_coords(1, 5, torch.device("cpu")),
        "isolate_modalities": False,
        "use_cross_timestep": True,
    }


LTX2_VIDEO = Case(
    "LTX2VideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "num_layers": 2,
        "rope_type": "split",
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
    },
    _ltx2_inputs,
    roles={"audio_hidden_states": "latents"},
)

KANDINSKY5 = Case(
    "Kandinsky5Transformer3DModel",
    {
        "in_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 12,
        "time_dim": 16,
        "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 2,
        "num_visual_blocks": 3,
        "axes_dims": (4, 6, 6),
        "visual_cond": True,
    },
    lambda draw: {
        # channels last: the latents, the latents of the condition (none here) and its mask
        "hidden_states": torch.cat([draw.normal(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 5)], dim=-1),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "pooled_projections": draw.normal(1, 12),
        "timestep": torch.tensor([700.0]),
        "visual_rope_pos": [torch.arange(3), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(6),
        "scale_factor": (1, 2, 2),
    },
)

KANDINSKY6 = Case(
    "Kandinsky6Transformer3DModel",
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 12,
        "time_dim": 16,
        "patch_size": (1, 2, 2),
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "visual_cond": True,
        "in_audio_dim": 6,
        "out_audio_dim": 6,
        "text_token_padding": True,
        "ca_rope": True,
        "cross_gates": True,
        "fix_modulation": True,
        "visual_token_type_num_embeddings": 2,
    },
    lambda draw: {
        # channels last: the latents, the latents of the condition (none here) and its mask
        "hidden_states": torch.cat([draw.normal(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 5)], dim=-1),
        "audio_hidden_states": draw.normal(1, 5, 6),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "pooled_projections": draw.normal(1, 12),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
    },
    roles={"audio_hidden_states": "latents"},
)

KANDINSKY6_SR = Case(
    "Kandinsky6SRTransformer3DModel",
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_visual_blocks": 3,
        "axes_dims": (4, 6, 6),
        "nabla_window": (1, 7, 7),  # the other frames are left to the choice made from queries and keys
    },
    lambda draw: {
        # 8x8 tokens make one block of the sparse attention, the least a frame may have
        "hidden_states": torch.cat([draw.normal(1, 3, 8, 8, 4), torch.zeros(1, 3, 8, 8, 5)], dim=-1),
        "timestep": torch.tensor([700.0]),
    },
)

LATTE = Case(
    "LatteTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "attention_bias": True,
        "sample_size": 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 24,
        "video_length": 3,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([700]),
        "enable_temporal_attentions": True,
    },
)


def _minimax_h3_inputs(draw: Draw) -> dict[str, Any]:
    # one sequence: 4 text tokens, 2 channels of 3 audio latents, 3 frames of 2x2 video patches
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 22)
    positions = torch.zeros(22, 3, dtype=torch.float64)
    positions[text, 0] = text.double()
    positions[audio, 0] = 4.0 + torch.arange(3).double().repeat(2)
    positions[audio, 2] = torch.tensor([0.0, 16.0]).double().repeat_interleave(3)
    frames = 4.0 + torch.tensor([0.0, 5 / 3, 25 / 3]).double()
    axis = torch.tensor([0.0, 16.0]).double()
    positions[video] = torch.cartesian_prod(frames, axis, axis)
    return {
        "hidden_states": draw.normal(1, 12, 16),
        "audio_hidden_states": draw.normal(1, 6, 6),
        "encoder_hidden_states": draw.normal(1, 4, 24),
        # the distinct timesteps, sorted: audio and video follow schedules of their own
        "timestep": torch.tensor([0.6, 0.7]),
        "timestep_indices": torch.tensor([1] * 4 + [0] * 6 + [1] * 12),
        "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 12),
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


MINIMAX_H3 = Case(
    "MiniMaxH3Transformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 2,
        "ffn_dim": 64,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 24,
        "freq_dim": 32,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 16,
        "rope_freq_dim": 3,
    },
    _minimax_h3_inputs,
    roles={"audio_hidden_states": "latents"},
)

MOCHI = Case(
    "MochiTransformer3DModel",
    {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "pooled_projection_dim": 24,
        "in_channels": 4,
        "text_embed_dim": 32,
        "time_embed_dim": 16,
        "max_sequence_length": 6,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "encoder_hidden_states": draw.normal(1, 6, 32),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
    },
)

MOTIF_VIDEO = Case(
    "MotifVideoTransformer3DModel",
    {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "rope_axes_dim": (4, 6, 6),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
    lambda draw: {
        # the latents, the latents of the condition (none here) and its mask
        "hidden_states": torch.cat([draw.normal(1, 4, 3, 4, 4), torch.zeros(1, 5, 3, 4, 4)], dim=1),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
    },
)

SANA_VIDEO = Case(
    "SanaVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "mlp_ratio": 2.0,
        "sample_size": 4,
        "rope_max_seq_len": 32,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([700]),
    },
)


def _sana_wm_inputs(draw: Draw) -> dict[str, Any]:
    # for each frame: the flat matrix camera -> world, then fx, fy, cx, cy in units of the latents
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, 2, 3] = torch.tensor([0.0, 0.3, 0.6])
    camera = torch.cat([pose.flatten(1), torch.tensor([2.0, 2.0, 1.0, 1.0]).repeat(3, 1)], dim=1)
    return {
        "hidden_states": draw.normal(1, 8, 3, 2, 2),
        "timestep": torch.tensor([[[0.0, 700.0, 700.0]]]),  # one for each frame; the first frame is given
        "encoder_hidden_states": draw.normal(1, 1, 6, 24),
        "data_info": {"img_hw": torch.tensor([[64.0, 64.0]])},
        "mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "camera_conditions": camera[None],
        "chunk_plucker": draw.normal(1, 12, 3, 2, 2),
    }


SANA_WM = Case(
    "SanaWMTransformer3DModel",
    {
        "in_channels": 8,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "chunk_plucker_channels": 12,
        "chunk_plucker_post_attn_blocks": 4,
        "caption_channels": 24,
        "mlp_ratio": 2.0,
    },
    _sana_wm_inputs,
)


def _sana_wm_refiner_inputs(draw: Draw) -> dict[str, Any]:
    # frames of 2x2 tokens: frame 0 is the attention sink, 1..3 are refined already, 4..6 are being refined
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(32, rope_type="split", num_attention_heads=2)
    coords = rope.prepare_video_coords(1, 7, 2, 2, torch.device("cpu"), fps=16.0)
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = rope(coords[:, :, :4])
    for layer in cache.layer_caches:
        layer.store_sink(draw.normal(1, 4, 32), draw.normal(1, 4, 32))
        layer.store_history(draw.normal(1, 12, 32), draw.normal(1, 12, 32))
    return {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.full((1, 12), 725.0),
        "video_rotary_emb": rope(coords[:, :, 16:]),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "kv_cache": cache,  # an object of diffusers, no tensor
        "kv_cache_mode": "inject",
    }


SANA_WM_REFINER = Case(
    "SanaWMLTX2RefinerTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 24,
        "rope_type": "split",
    },
    _sana_wm_refiner_inputs,
)

SKYREELS_V2 = Case(
    "SkyReelsV2Transformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
    },
)

WAN_ANIMATE = Case(
    "WanAnimateTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 12,
        "latent_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 4,
        "image_dim": 24,
        "added_kv_proj_dim": 32,
        "rope_max_seq_len": 32,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 4},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
        "motion_encoder_batch_size": 3,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 12, 3, 4, 4),
        "timestep": torch.tensor([700]),
        # with image embeddings, the class takes the last 512 tokens for the text
        "encoder_hidden_states": draw.normal(1, 512, 24),
        "encoder_hidden_states_image": draw.normal(1, 5, 24),
        "pose_hidden_states": draw.normal(1, 4, 2, 4, 4),
        "face_pixel_values": draw.normal(1, 3, 5, 16, 16),
    },
)


def _wan_animate2_inputs(draw: Draw) -> dict[str, Any]:
    # 2 frames of the reference video; the generated frames are preceded by one of the reference image
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(draw.normal(1, 8, 2, 16), draw.normal(1, 8, 2, 16))
    return {
        "hidden_states": [draw.normal(4, 3, 4, 4)],
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": [draw.normal(6, 24)],
        "condition_latents": [draw.normal(8, 3, 4, 4)],
        "kv_cache": cache,  # an object of diffusers, no tensor
        "kv_cache_mode": "cached",
        "seq_len": 12,
        "encoder_hidden_states_image": draw.normal(1, 5, 1280),
        "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
        "origin_len": 5,
        "origin_area": [32, 32],
        "is_uncondtion": False,
    }


WAN_ANIMATE2 = Case(
    "WanAnimate2Transformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "text_len": 8,
        "in_dim": 12,
        "dim": 32,
        "ffn_dim": 64,
        "freq_dim": 32,
        "text_dim": 24,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
    },
    _wan_animate2_inputs,
    roles={"hidden_states.0": "latents"},
)

WAN_VACE = Case(
    "WanVACETransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 4,
        "rope_max_seq_len": 32,
        "vace_layers": [0, 2],
        "vace_in_channels": 12,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 3, 4, 4),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "control_hidden_states": draw.normal(1, 12, 3, 4, 4),
        "control_hidden_states_scale": torch.ones(2),
    },
)

CASES = (
    KANDINSKY5,
    KANDINSKY6_SR,
    KANDINSKY6,
    LTX2_VIDEO,
    LTX_VIDEO,
    LATTE,
    MINIMAX_H3,
    MOCHI,
    MOTIF_VIDEO,
    SANA_VIDEO,
    SANA_WM_REFINER,
    SANA_WM,
    SKYREELS_V2,
    WAN_ANIMATE2,
    WAN_ANIMATE,
    WAN,
    WAN_VACE,
)
