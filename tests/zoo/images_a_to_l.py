"""Image transformers of `diffusers`, AuraFlow to Lumina."""

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

from tests.zoo.base import Case


def _grid_ids(height: int, width: int) -> Tensor:
    """Position ids (0, row, column) of image tokens, in reading order."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def _product_ids(*sizes: int) -> Tensor:
    """Position ids of the points of a grid with these sizes, in reading order."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


FLUX = Case(
    "FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "pooled_projections": draw.normal(1, 20),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": _grid_ids(4, 4),
    },
)

HUNYUAN_DIT = Case(
    "HunyuanDiT2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "sample_size": 8,
        "hidden_size": 32,
        "num_layers": 6,  # the last two take the results of the first two
        "mlp_ratio": 2.0,
        "learn_sigma": True,
        "cross_attention_dim": 24,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 20,
        "text_len": 4,
        "text_len_t5": 5,
        "use_style_cond_and_image_meta_size": True,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 4, 24),
        "text_embedding_mask": torch.tensor([[1, 1, 1, 0]]),
        "encoder_hidden_states_t5": draw.normal(1, 5, 16),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 0, 0]]),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    },
)

AURA_FLOW = Case(
    "AuraFlowTransformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 64,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([0.7]),
    },
)

DIT = Case(
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,  # noise and variance
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([700]),
        "class_labels": draw.integers(10, 1),
    },
)

CHROMA = Case(
    "ChromaTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 2,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": _grid_ids(4, 4),
        # The pipeline passes a float mask, over text and image tokens.
        "attention_mask": torch.cat([torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]), torch.ones(1, 16)], dim=1),
    },
)

BRIA = Case(
    "BriaTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": [4, 6, 6],
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": _grid_ids(4, 4),
    },
)

BRIA_FIBO = Case(
    "BriaFiboTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,  # the last two layers of the text encoder, side by side
        "axes_dims_rope": [4, 6, 6],
        "text_encoder_dim": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 48),
        "text_encoder_layers": [draw.normal(1, 6, 24) for _ in range(4)],  # one for each block
        # The pipeline passes a mask when the two prompts of guidance differ in length.
        "joint_attention_kwargs": {"attention_mask": torch.tensor([[[[True] * 4 + [False] * 2 + [True] * 16]]])},
        "txt_ids": torch.zeros(6, 3),
        "img_ids": _grid_ids(4, 4),
    },
)

BRIA_FIBO2 = Case(
    "BriaFibo2Transformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "cap_feat_dim": 24,
        "injection_layer_ids": (1, 3),
        "perceiver_num_layers": 2,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 12,
        "axes_dims": (4, 6, 6),
        "axes_lens": (16, 8, 8),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.7]),
        # The features for the gist tokens, then those for each injection layer.
        "encoder_hidden_states": draw.normal(1, 3, 6, 24),
    },
)

COG_VIEW3_PLUS = Case(
    "CogView3PlusTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "out_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([700]),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    },
)

COG_VIEW4 = Case(
    "CogView4Transformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "pos_embed_max_size": 8,
        "sample_size": 8,
        "rope_axes_dim": (16, 16),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([700.0]),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    },
)

# No pipeline calls this class: it is a part of DreamLite's UNet, there without time (norm_type "layer_norm").
DREAM_LITE = Case(
    "DreamLiteTransformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "num_layers": 3,
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "num_embeds_ada_norm": 10,
        "use_linear_projection": True,
        "norm_type": "ada_norm_zero",
        "qk_norm": "rms_norm",
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 4, 4),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "timestep": torch.tensor([700]),
        "class_labels": draw.integers(10, 1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    },
)

ERNIE_IMAGE = Case(
    "ErnieImageTransformer2DModel",
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 3,
        "ffn_hidden_size": 64,
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 1,
        "text_in_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 8, 4, 4),
        "timestep": torch.tensor([700.0]),
        "text_bth": draw.normal(1, 6, 24),
        "text_lens": torch.tensor([6]),
    },
)

FLUX2 = Case(
    "Flux2Transformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 32,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": True,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([4.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": _product_ids(1, 1, 1, 6)[None],
        "img_ids": _product_ids(1, 4, 4, 1)[None],
    },
)

FLUX3 = Case(
    "Flux3Transformer2DModel",
    {
        "in_channels": 8,
        "cond_in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_channels": 32,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": _product_ids(1, 1, 1, 6).float(),
        "img_ids": _product_ids(1, 4, 4, 1).float(),
    },
)

GLM_IMAGE = Case(
    "GlmImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 20,
    },
    # Without images to edit, the pipeline passes a `kv_caches` object that does nothing; it is left out.
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "prior_token_id": draw.integers(20, 1, 16),
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": torch.tensor([699.0]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    },
)

HI_DREAM_IMAGE = Case(
    "HiDreamImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [24, 20],  # of T5 and of Llama
        "text_emb_dim": 12,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (16, 16),
        "llama_layers": [0, 1, 2, 2],  # one for each block
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timesteps": torch.tensor([700.0]),
        "encoder_hidden_states_t5": draw.normal(1, 4, 24),
        "encoder_hidden_states_llama3": draw.normal(3, 1, 4, 20),  # the first axis counts layers
        "pooled_embeds": draw.normal(1, 12),
    },
)

HUNYUAN_IMAGE = Case(
    "HunyuanImageTransformer2DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "patch_size": (1, 1),
        "text_embed_dim": 24,
        "text_embed_2_dim": 20,
        "rope_axes_dim": (8, 8),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 8, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "encoder_hidden_states_2": draw.normal(1, 4, 20),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
    },
)

IDEOGRAM4 = Case(
    "Ideogram4Transformer2DModel",
    {
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "adaln_dim": 24,
        "llm_features_dim": 24,
        "mrope_section": (4, 2, 2),
    },
    # Two tokens of padding, four of text, sixteen of the image; latents and text features span all of them.
    lambda draw: {
        "hidden_states": torch.cat([torch.zeros(1, 6, 8), draw.normal(1, 16, 8)], dim=1),
        "timestep": torch.tensor([0.3]),  # from 0 (noise) to 1
        "encoder_hidden_states": torch.cat(
            [torch.zeros(1, 2, 24), draw.normal(1, 4, 24), torch.zeros(1, 16, 24)], dim=1
        ),
        "position_ids": torch.cat(
            [
                torch.zeros(2, 3, dtype=torch.long),
                torch.arange(4)[:, None].expand(4, 3),
                _product_ids(1, 4, 4) + 65536,
            ]
        )[None],
        "segment_ids": torch.tensor([[-1] * 2 + [1] * 20]),
        "indicator": torch.tensor([[0] * 2 + [3] * 4 + [2] * 16]),
    },
)

KREA2 = Case(
    "Krea2Transformer2DModel",
    {
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 24,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "encoder_hidden_states": draw.normal(1, 6, 3, 24),
        "timestep": torch.tensor([0.7]),
        "position_ids": torch.cat([torch.zeros(6, 3), _grid_ids(4, 4)]),
        "encoder_attention_mask": torch.tensor([[True, True, True, False, False, True]]),
    },
)

LONG_CAT_IMAGE = Case(
    "LongCatImageTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 24,
        "axes_dims_rope": [4, 6, 6],
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": torch.arange(6.0)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
        "img_ids": _grid_ids(4, 4) + torch.tensor([1.0, 512.0, 512.0]),
    },
)

LUMINA2 = Case(
    "Lumina2Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (16, 8, 8),
        "cap_feat_dim": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.3]),  # from 0 (noise) to 1
        "encoder_hidden_states": draw.normal(1, 6, 24),
        # The sequence of the blocks is as long as the image and the tokens that this mask keeps.
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    },
)

LUMINA_NEXT = Case(
    "LuminaNextDiT2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "learn_sigma": True,
        "qk_norm": True,
        "cross_attention_dim": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.3]),  # from 0 (noise) to 1
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        # Complex numbers, for a grid larger than the image's.
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 8),
        "cross_attention_kwargs": {"base_sequence_length": 9},
    },
)

CASES = (
    FLUX,
    HUNYUAN_DIT,
    AURA_FLOW,
    DIT,
    CHROMA,
    BRIA,
    BRIA_FIBO,
    BRIA_FIBO2,
    COG_VIEW3_PLUS,
    COG_VIEW4,
    DREAM_LITE,
    ERNIE_IMAGE,
    FLUX2,
    FLUX3,
    GLM_IMAGE,
    HI_DREAM_IMAGE,
    HUNYUAN_IMAGE,
    IDEOGRAM4,
    KREA2,
    LONG_CAT_IMAGE,
    LUMINA2,
    LUMINA_NEXT,
)
