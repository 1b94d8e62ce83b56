"""Transformers of `diffusers` for audio and for molecules, priors, and parts of UNets."""

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from tests.zoo.base import Case

ACE_STEP = Case(
    "AceStepTransformer1DModel",
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,  # sliding window and full attention in turn
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "in_channels": 24,  # source latents, mask of the part to make, and the noisy latents
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "sliding_window": 2,
        "encoder_hidden_size": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        # The pipeline passes the same time twice.
        "timestep": torch.tensor([0.7]),
        "timestep_r": torch.tensor([0.7]),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "context_latents": torch.cat([draw.normal(1, 16, 8), torch.ones(1, 16, 8)], dim=-1),
    },
    roles={"timestep_r": "timestep"},
)

LONGCAT_AUDIO = Case(
    "LongCatAudioDiTTransformer",
    {
        "dit_dim": 32,
        "dit_depth": 3,
        "dit_heads": 2,
        "dit_text_dim": 24,
        "latent_dim": 8,
        "ff_mult": 2.0,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 16, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False, False]]),
        "timestep": torch.tensor([0.7]),
        "attention_mask": torch.ones(1, 16, dtype=torch.bool),
        "latent_cond": torch.zeros(1, 16, 8),
    },
)

MINIMAX_MUSIC_DECODER = Case(
    "MiniMaxMusic3RVQDepthDecoder",
    {
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "audio_vocab_size": 10,
        "num_codebooks": 4,
        "max_position_embeddings": 8,
    },
    # It predicts the codes of one audio frame one by one; there is no time.
    lambda draw: {"inputs_embeds": draw.normal(1, 4, 32)},
    roles={"inputs_embeds": "latents"},
)

MINIMAX_MUSIC = Case(
    "MiniMaxMusic3Transformer1DModel",
    {
        "in_channels": 8,
        "condition_dim": 24,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ff_inner_dim": 64,
        "rotary_dim": 8,
        "fourier_embedding_dim": 32,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 8, 16),
        "timestep": torch.tensor([0.3]),  # 0 at pure noise, 1 at the audio
        "encoder_hidden_states": draw.normal(1, 16, 24),
    },
)

STABLE_AUDIO_3 = Case(
    "StableAudio3DiTModel",
    {
        "io_channels": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "cond_token_dim": 24,
        "global_cond_dim": 24,
        "local_add_cond_dim": 9,
        "timestep_features_dim": 32,
        "ff_mult": 2.0,
        "num_memory_tokens": 4,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 8, 16),
        "timestep": torch.tensor([0.7]),
        # The last token is the duration.
        "encoder_hidden_states": draw.normal(1, 7, 24),
        "global_hidden_states": draw.normal(1, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 1]]),
    },
)

STABLE_AUDIO = Case(
    "StableAudioDiTModel",
    {
        "sample_size": 16,
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 1,
        "out_channels": 8,
        "cross_attention_dim": 24,
        "time_proj_dim": 32,
        "global_states_input_dim": 48,
        "cross_attention_input_dim": 24,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 8, 16),
        "timestep": torch.tensor([0.9]),
        # The last two tokens are the start and the end of the audio.
        "encoder_hidden_states": draw.normal(1, 8, 24),
        "global_hidden_states": draw.normal(1, 1, 48),
        # For half of the channels of a head; one position more than the latents have.
        "rotary_embedding": get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False),
    },
)

T5_FILM = Case(
    "T5FilmDecoder",
    {
        "input_dims": 8,
        "targets_length": 16,
        "d_model": 32,
        "num_layers": 3,
        "num_heads": 2,
        "d_kv": 16,
        "d_ff": 64,
    },
    lambda draw: {
        # Notes and the spectrogram before, each with its mask.
        "encodings_and_masks": [
            (draw.normal(1, 6, 32), torch.tensor([[True, True, True, True, False, False]])),
            (draw.normal(1, 16, 32), torch.ones(1, 16, dtype=torch.bool)),
        ],
        "decoder_input_tokens": draw.normal(1, 16, 8),
        "decoder_noise_time": torch.tensor([0.7]),
    },
    roles={"decoder_input_tokens": "latents", "decoder_noise_time": "timestep"},
)

RFD4_PROTEINA = Case(
    "RFD4ProteinaTransformer",
    {
        "nlayers": 4,  # the pairs are updated after the first and the third
        "token_dim": 32,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 16,
        "latent_dim": 4,
        "token_type_emb_dim": 8,
        "cath_emb_dim": 4,
        "t_emb_dim": 16,
        "seq_sep_dim": 8,
        "xt_pair_dist_dim": 8,
        "tri_mult_c": 16,
        "num_sequence_classes": 10,
        "recycle_conditioning_dim": 3,
    },
    lambda draw: {
        "bb_ca": draw.normal(1, 8, 3),
        "local_latents": draw.normal(1, 8, 4),
        "bb_ca_time": torch.tensor([0.3]),  # 0 at pure noise, 1 at the molecule
        "local_latents_time": torch.tensor([0.2]),
        "padding_mask": torch.tensor([[True] * 7 + [False]]),
        "token_type": torch.zeros(1, 8, dtype=torch.int64),
        "atom37_mask": draw.integers(2, 1, 8, 37).bool(),
        # Without the chirality feature, which is there for molecules with chiral centres.
        "conditioning": {
            "is_in_context_conditioning": torch.tensor([[False] * 6 + [True] * 2]),
            "supports_local_latent": torch.tensor([[True] * 8]),
            "token_bond_path_length": (torch.arange(8)[:, None] - torch.arange(8)).abs()[None],
            "molecule_iid": torch.zeros(1, 8, dtype=torch.int64),
            "molecule_entity_id": torch.zeros(1, 8, dtype=torch.int64),
            "canonical_polymer_ordering": torch.ones(8, 8).triu(1)[None],
            "condition_coordinate_1_atom": draw.normal(1, 8, 37, 3),
            "condition_index-group_1_token": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]),
            "condition_secondary-structure_1_residue": draw.integers(4, 1, 8),
            **{
                f"condition_{kind}_1_atom": draw.integers(values, 1, 8, 37)
                for kind, values in {
                    "hbond": 4,
                    "pication": 4,
                    "pistack": 2,
                    "saltbridge": 3,
                    "hydrophobic": 2,
                    "metal-coord": 3,
                }.items()
            },
        },
        "recycle_depth": 2,  # the layers run twice in one call; the pipeline lowers it from 6 to 1 while sampling
    },
    roles={
        "bb_ca": "latents",
        "local_latents": "latents",
        "bb_ca_time": "timestep",
        "local_latents_time": "timestep",
    },
)

TEMPORAL = Case(
    "TransformerTemporalModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "num_layers": 3,
        "norm_num_groups": 4,
    },
    # A part of UNets; its blocks take no time.
    lambda draw: {"hidden_states": draw.normal(4, 16, 4, 4), "num_frames": 4},
)

TRANSFORMER_2D = Case(
    "Transformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 24,  # the size conditions need a width that is a multiple of 3
        "in_channels": 4,
        "out_channels": 8,  # noise and variance
        "num_layers": 3,
        "cross_attention_dim": 48,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 24,
        "use_additional_conditions": True,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([700]),
        "added_cond_kwargs": {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])},
    },
)

PRIOR = Case(
    "PriorTransformer",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "embedding_dim": 24,
        "num_embeddings": 6,
        "additional_embeddings": 4,
    },
    lambda draw: {
        "hidden_states": draw.normal(1, 24),
        "timestep": torch.tensor(700),
        "proj_embedding": draw.normal(1, 24),
        "encoder_hidden_states": draw.normal(1, 6, 24),
        "attention_mask": torch.tensor([[True, True, True, True, False, False]]),
    },
)

CASES = (
    ACE_STEP,
    LONGCAT_AUDIO,
    MINIMAX_MUSIC,
    MINIMAX_MUSIC_DECODER,
    PRIOR,
    RFD4_PROTEINA,
    STABLE_AUDIO,
    STABLE_AUDIO_3,
    T5_FILM,
    TEMPORAL,
    TRANSFORMER_2D,
)
