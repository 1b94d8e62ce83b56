"""Image transformers of `diffusers`, NucleusMoE to ZImage, and JoyImage."""

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo.base import Case


class _WithExperts(Case):
    """A class that leaves the weights of its experts uninitialised."""

    __slots__ = ()

    def build(self, seed: int = 0) -> nn.Module:
        """The module with random weights, those of the experts among them."""
        torch.manual_seed(seed)
        module = getattr(diffusers, self.name)(**self.config).eval()
        for name, parameter in module.named_parameters():
            if ".experts." in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.data += 0.1 * torch.randn_like(parameter)
        return module


def _omni_gen_mask() -> Tensor:
    """Float mask of 8 prompt tokens (2 to 5 an input image), the time token and 16 image tokens."""
    mask = torch.ones(25, 25).tril()  # the prompt is causal
    mask[2:6, 2:6] = 1
    mask[9:] = 1
    return mask[None]


SD3 = Case(
    "SD3Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1),  # as in 3.5: the first blocks attend twice
        "qk_norm": "rms_norm",
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "pooled_projections": draw.normal(1, 20),
    },
)

PIXART = Case(
    "PixArtTransformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,  # noise and variance
        "num_layers": 3,
        "cross_attention_dim": 32,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 24,
        "use_additional_conditions": False,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
)

QWEN_IMAGE = Case(
    "QwenImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 16),
        "timestep": torch.tensor([0.7]),
        # The pipeline passes no text mask where no text token is padding.
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "img_shapes": [[(1, 4, 4)]],
        "attention_kwargs": {},
    },
)

SANA = Case(
    "SanaTransformer2DModel",
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
        "patch_size": 1,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 4, 4),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([700.0]),
    },
)

Z_IMAGE = Case(
    "ZImageTransformer2DModel",
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 16, 16],
    },
    lambda draw: {
        # One tensor for each image of the batch; the result is such a list as well.
        "x": [draw.normal(4, 1, 8, 8)],
        "t": torch.tensor([0.3]),  # 0 at pure noise, 1 at the image
        "cap_feats": [draw.normal(6, 24)],
    },
    roles={"x.0": "latents"},
)

OMNI_GEN = Case(
    "OmniGenTransformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_layers": 3,
        "pad_token_id": 0,
        "vocab_size": 40,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},  # one of each pair of channels
        "pos_embed_max_size": 8,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.3]),  # 0 at pure noise, 1 at the image
        # An input image takes the place of the tokens 2 to 5.
        "input_ids": torch.tensor([[7, 8, 0, 0, 0, 0, 9, 10]]),
        "input_img_latents": [draw.normal(1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 6]]},
        "attention_mask": _omni_gen_mask(),
        "position_ids": torch.arange(25)[None],
    },
)

OVIS_IMAGE = Case(
    "OvisImageTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "txt_ids": torch.arange(6.0)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "joint_attention_kwargs": {},
    },
)

PRX = Case(
    "PRXTransformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 24,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 3,
        "axes_dim": [8, 8],
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "attention_mask": torch.tensor([[True, True, True, True, False, False]]),
    },
)

QWEN_IMAGE_21 = Case(
    "QwenImage21Transformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 24,
        "mlp_ratio": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "img_shapes": [[(1, 4, 4)]],
        # The text tokens, then one slot for each 2x2 image tokens; the result has the text tokens as well.
        "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
        "attention_kwargs": {},
    },
)

NUCLEUS_MOE = _WithExperts(
    "NucleusMoEImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 6,  # three without experts, two with, one without
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
        "mlp_ratio": 6.0,  # 32 * 6 * 2/3 = 128, the least width of a block without experts
        "num_experts": 4,
        "moe_intermediate_dim": 32,
        "capacity_factors": 2.0,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 16),
        "timestep": torch.tensor([0.7]),
        # The text is padded to a multiple of 8 tokens.
        "encoder_hidden_states": draw.normal(1, 8, 24),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]),
        "img_shapes": [(1, 4, 4)],
        "attention_kwargs": {},
    },
)

JOY_IMAGE_EDIT = Case(
    "JoyImageEditTransformer3DModel",
    {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 24,
        "mlp_width_ratio": 2.0,
        "num_layers": 3,
        "rope_dim_list": [4, 6, 6],
    },
    lambda draw: {
        # The reference image, which the pipeline puts back at each step, and the noisy image.
        "hidden_states": draw.normal(1, 2, 4, 1, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
    },
)

JOY_IMAGE_EDIT_PLUS = Case(
    "JoyImageEditPlusTransformer3DModel",
    {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 24,
        "mlp_width_ratio": 2.0,
        "num_layers": 3,
        "rope_dim_list": [4, 6, 6],
    },
    lambda draw: {
        # The 16 patches of the noisy image, then the 8 of a reference image, which the pipeline puts back at each step.
        "hidden_states": draw.normal(1, 24, 4, 1, 2, 2),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "shape_list": [[(1, 4, 4), (1, 2, 4)]],
    },
)

CASES = (
    JOY_IMAGE_EDIT,
    JOY_IMAGE_EDIT_PLUS,
    NUCLEUS_MOE,
    OMNI_GEN,
    OVIS_IMAGE,
    PIXART,
    PRX,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    SANA,
    SD3,
    Z_IMAGE,
)
