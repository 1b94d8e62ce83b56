"""Video transformers of `diffusers`, A to H."""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from tests.zoo.base import Case, Draw


def _allegro_rotary(head_dim: int, frames: int, height: int, width: int) -> tuple[tuple[Tensor, ...], ...]:
    """Rotary angles per axis, and the position of each token on each axis."""
    scale = (2.2, 2.0, 2.0)
    crop = ((0, 0), (height, width))
    *angles, t, h, w = get_3d_rotary_pos_embed_allegro(head_dim, crop, (height, width), frames, scale)
    return tuple(angles), tuple(torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None].contiguous())


def _far_cache(draw: Draw, layers: int, full: int, compressed: int) -> dict[int, dict[str, Tensor]]:
    """Keys and values (2, batch, heads, tokens, head dim) of the chunks before, per layer."""
    return {
        layer: {
            "full_cache": draw.normal(2, 1, 2, full, 16),
            "compressed_cache": draw.normal(2, 1, 2, compressed, 16),
        }
        for layer in range(layers)
    }


def _cosmos3_positions(text: int, frames: int, height: int, width: int) -> Tensor:
    """Position (3, tokens) of the text, then of the frames, which start far behind it."""
    words = torch.arange(text, dtype=torch.float32).expand(3, -1)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T.float()
    return torch.cat([words, grid + torch.tensor([[text + 15000.0], [0.0], [0.0]])], dim=1)


ALLEGRO = Case(
    "AllegroTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "cross_attention_dim": 48,
        "sample_height": 4,
        "sample_width": 8,
        "sample_frames": 2,
        "caption_channels": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([601.0]),
        "image_rotary_emb": _allegro_rotary(24, 2, 2, 4),
    },
)

# One chunk of the loop over chunks: the fourth, with the first in compressed form and two in full before it.
ANYFLOW_FAR = Case(
    "AnyFlowFARTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
        "chunk_partition": (1, 1, 1, 2),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 2, 4, 4, 8),  # frames before channels
        "timestep": torch.full((1, 2), 601.0),
        "r_timestep": torch.full((1, 2), 401.0),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "chunk_partition": [1, 1, 1, 2],
        "kv_cache": _far_cache(draw, 3, 48, 8),
        "kv_cache_flag": {"num_cached_chunks": 3, "is_cache_step": False},
    },
    {"r_timestep": "timestep"},  # the time after the step
)

ANYFLOW = Case(
    "AnyFlowTransformer3DModel",
    {
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
        "hidden_states": draw.normal(1, 2, 4, 4, 8),  # frames before channels
        "timestep": torch.full((1, 2), 601.0),
        "r_timestep": torch.full((1, 2), 401.0),
        "encoder_hidden_states": draw.normal(1, 6, 24),
    },
    {"r_timestep": "timestep"},  # the time after the step
)

CHRONOEDIT = Case(
    "ChronoEditTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 12,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "image_dim": 20,
        "added_kv_proj_dim": 24,
        "rope_max_seq_len": 32,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 12, 2, 4, 8),  # noise, mask of the given frame, its latents
        "timestep": torch.tensor([601]),
        "encoder_hidden_states": draw.normal(1, 512, 16),  # the attention takes the last 512 tokens for the text
        "encoder_hidden_states_image": draw.normal(1, 5, 20),
    },
)

COGVIDEOX = Case(
    "CogVideoXTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 6,
        "use_rotary_positional_embeddings": True,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 2, 4, 4, 8),  # frames before channels
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([601]),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (2, 4)), (2, 4), 2),
    },
)

CONSISID = Case(
    "ConsisIDTransformer3DModel",
    {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 8,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 6,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
        "is_train_face": True,
        "cross_attn_dim_head": 16,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 20,
        "LFE_vit_dim": 16,
        "LFE_depth": 4,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 4,
        "LFE_output_dim": 32,  # two thirds of the width
        "LFE_ff_mult": 2,
        "LFE_num_scale": 2,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 2, 8, 4, 8),  # frames before channels: noise, latents of the image
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([601]),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (2, 4)), (2, 4), 2),
        "id_vit_hidden": [draw.normal(1, 5, 16), draw.normal(1, 5, 16)],
        "id_cond": draw.normal(1, 20),
    },
)

COSMOS3_OMNI = Case(
    "Cosmos3OmniTransformer",
    {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "latent_channel": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "patch_latent_dim": 16,
        "rope_axes_dim": (4, 2, 2),
        "vocab_size": 32,
    },
    lambda draw: {
        "input_ids": draw.integers(32, 6),
        "text_indexes": torch.arange(6),
        "position_ids": _cosmos3_positions(6, 2, 2, 4),
        "und_len": 6,
        "sequence_length": 22,
        "vision_tokens": [draw.normal(1, 4, 2, 4, 8)],
        "vision_token_shapes": [(2, 2, 4)],
        "vision_sequence_indexes": torch.arange(6, 22),
        "vision_mse_loss_indexes": torch.arange(6, 22),
        "vision_timesteps": torch.full((16,), 601),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    },
    {"vision_tokens.0": "latents", "vision_timesteps": "timestep"},
)

# Without the channel of a padding mask: to resize the mask needs torchvision.
COSMOS = Case(
    "CosmosTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "adaln_lora_dim": 8,
        "max_size": (4, 8, 8),
        "concat_padding_mask": False,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "fps": 30,
    },
)

EASYANIMATE = Case(
    "EasyAnimateTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 3,
        "mmdit_layers": 3,
        "time_embed_dim": 32,
        "add_norm_text_encoder": True,
        "text_embed_dim": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "timestep": torch.tensor([601.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
    },
)

HELIOS = Case(
    "HeliosTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_dim": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "timestep": torch.tensor([601.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "indices_hidden_states": torch.arange(8, 10)[None],
        "indices_latents_history_short": torch.tensor([[0, 7]]),
        "indices_latents_history_mid": torch.arange(5, 7)[None],
        "indices_latents_history_long": torch.arange(1, 5)[None],
        "latents_history_short": draw.normal(1, 4, 2, 4, 8),
        "latents_history_mid": draw.normal(1, 4, 2, 4, 8),
        "latents_history_long": draw.normal(1, 4, 4, 4, 8),
    },
)

HUNYUAN_VIDEO_15 = Case(
    "HunyuanVideo15Transformer3DModel",
    {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "text_embed_2_dim": 20,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        "task_type": "t2v",
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 9, 2, 2, 4),  # noise, latents of a first frame, mask of that frame
        "timestep": torch.tensor([601.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
        "encoder_hidden_states_2": draw.normal(1, 4, 20),
        "encoder_attention_mask_2": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        "image_embeds": torch.zeros(1, 4, 12),  # all zero: text to video
    },
)

HUNYUAN_VIDEO_FRAMEPACK = Case(
    "HunyuanVideoFramepackTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        "has_image_proj": True,
        "image_proj_dim": 20,
        "has_clean_x_embedder": True,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "timestep": torch.tensor([601.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
        "pooled_projections": draw.normal(1, 12),
        "image_embeds": draw.normal(1, 4, 20),
        "indices_latents": torch.arange(3, 5),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": draw.normal(1, 4, 2, 4, 8),
        "indices_latents_clean": torch.tensor([0, 5]),
        "latents_history_2x": draw.normal(1, 4, 2, 4, 8),
        "indices_latents_history_2x": torch.arange(6, 8),
        "latents_history_4x": draw.normal(1, 4, 4, 4, 8),
        "indices_latents_history_4x": torch.arange(8, 12),
    },
)

HUNYUAN_VIDEO = Case(
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 2, 4, 8),
        "timestep": torch.tensor([601.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
        "pooled_projections": draw.normal(1, 12),
        "guidance": torch.tensor([6000.0]),
    },
)

CASES = (
    ALLEGRO,
    ANYFLOW_FAR,
    ANYFLOW,
    CHRONOEDIT,
    COGVIDEOX,
    CONSISID,
    COSMOS3_OMNI,
    COSMOS,
    EASYANIMATE,
    HELIOS,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
    HUNYUAN_VIDEO,
)
