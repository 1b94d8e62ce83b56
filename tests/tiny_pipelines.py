"""Real `diffusers` pipelines, small and with random weights; all but DiT's need the package `transformers`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TOKENS = 6  # text tokens of a prompt
TEXT = 16  # width of the text embeddings
POOLED = 12  # width of the pooled text embedding, where there is one
NEGATIVE = 997  # number of the negative prompt

Call = Callable[[int], dict[str, Any]]
Part = functools.partial[Any]  # makes a component


@dataclass(frozen=True, slots=True)
class TinyPipeline:
    """A pipeline of `diffusers` and how to call it.

    Args:
        name: model family.
        make: a new pipeline, the same weights every time.
        call: arguments of one call for prompt number n, with guidance; without generator,
            number of steps and output type.
        unguided: the same without guidance.
        schedulers: make another scheduler that the pipeline accepts from the configuration of its own.
    """

    name: str
    make: Callable[[], "DiffusionPipeline"]
    call: Call
    unguided: Call | None
    schedulers: tuple[Callable[[Any], Any], ...] = ()


def draw(pipeline: Any, tiny_call: Mapping[str, Any], num_steps: int, seed: int = 0, **options: Any) -> Tensor:
    """Latents of one generation; pixels for DiT, whose pipeline does not hand out latents."""
    arguments = {
        "num_inference_steps": num_steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt" if isinstance(pipeline, diffusers.DiTPipeline) else "latent",
    }
    return pipeline(**arguments | dict(tiny_call) | options, return_dict=False)[0]


def stack(*calls: Mapping[str, Any]) -> dict[str, Any]:
    """One call for the prompts of several calls."""
    return {name: _join([call[name] for call in calls]) for name in calls[0]}


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [item for value in values for item in value] if isinstance(values[0], list) else values[0]


def maker(pipeline: str, **parts: Any) -> Callable[[], "DiffusionPipeline"]:
    """How to make a pipeline of these parts; what else its constructor asks for is None.

    Args:
        pipeline: its class in `diffusers`.
        parts: arguments of its constructor; those that are a `functools.partial`, as `part` returns it,
            are called each time, others are handed on as they are.
    """

    def make() -> "DiffusionPipeline":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = {name: each() if isinstance(each, functools.partial) else each for name, each in parts.items()}
        for each in made.values():
            if isinstance(each, nn.Module):
                each.eval()
        cls = getattr(diffusers, pipeline)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        absent = {p.name: None for p in parameters if p.default is p.empty and p.name not in made}
        result = cls(**absent, **made)
        result.set_progress_bar_config(disable=True)
        return result

    return make


def part(name: str, **config: Any) -> Part:
    """A component of a class of `diffusers`, made of a configuration."""
    return functools.partial(_new, name, config)


def _new(name: str, config: Mapping[str, Any]) -> Any:
    made = getattr(diffusers, name)(**config)
    return _without_constants(made) if isinstance(made, nn.Module) else made


def _parts(scheduler: Part, vae: Part, transformer: Part) -> dict[str, Part]:
    """What most pipelines are made of; the transformer is made first."""
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae}


def _without_constants(module: nn.Module) -> nn.Module:
    """Add noise to constant parameters: gates would be shut, or scales and shifts without effect."""
    for parameter in module.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def prompt(n: int, tokens: int = TOKENS, pooled: bool = False, mask: str = "", padding: bool = True) -> dict[str, Any]:
    """Embeddings of a prompt, with a mask if it is given a name."""
    generator = torch.Generator().manual_seed(n)
    result = {"prompt_embeds": torch.randn(1, tokens, TEXT, generator=generator)}
    if pooled:
        result["pooled_prompt_embeds"] = torch.randn(1, POOLED, generator=generator)
    if mask:
        result[mask] = (torch.arange(tokens) < tokens - (1 + n % 3) * padding)[None].long()
    return result


def calls(
    size: Mapping[str, Any],
    guided: Mapping[str, Any],
    unguided: Mapping[str, Any],
    negative_tokens: int = TOKENS,
    image: bool = False,
    **text: Any,
) -> tuple[Call, Call]:
    """The calls with and without guidance; only the former pass a negative prompt."""

    def arguments(n: int) -> dict[str, Any]:
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(n))
        return {**size, **prompt(n, **text), **({"image": picture, "strength": 0.6} if image else {})}

    def negative() -> dict[str, Any]:
        return {f"negative_{k}": v for k, v in prompt(NEGATIVE, negative_tokens, **text).items()}

    return lambda n: arguments(n) | negative() | guided, lambda n: arguments(n) | unguided


def scheduler(name: str, **changes: Any) -> Callable[[Any], Any]:
    return lambda config: getattr(diffusers, name).from_config(config, **changes)


def image_vae(**config: Any) -> Part:
    """Two pixels to a latent."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return part("AutoencoderKL", down_block_types=down, up_block_types=up, latent_channels=4, **NARROW | config)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
FLOW_UNIPC = scheduler("UniPCMultistepScheduler", **FLOW)
FLOW_DPM = scheduler("DPMSolverMultistepScheduler", **FLOW)
FLOW_EULER = scheduler("FlowMatchEulerDiscreteScheduler", shift=5.0)
FLOW_HEUN = scheduler("FlowMatchHeunDiscreteScheduler", shift=3.0)
UNIPC = scheduler("UniPCMultistepScheduler")
DPM = scheduler("DPMSolverMultistepScheduler")
DDIM = scheduler("DDIMScheduler", clip_sample=False)
HEUN = scheduler("HeunDiscreteScheduler")
COG_DPM = scheduler("CogVideoXDPMScheduler")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}  # 24 wide
LATENTS = {"in_channels": 4, "out_channels": 4}
NARROW = {"block_out_channels": (4, 4), "norm_num_groups": 2, "mid_block_add_attention": False}
MILD = {"beta_end": 0.002}  # little noise, or latents of models that cannot predict it would grow a hundredfold
UNSCALED = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}

# every size gives 4x4 patches, in the videos twice
IMAGE = {"height": 16, "width": 16}
WAN_SIZE = {"height": 32, "width": 32, "num_frames": 5}
VIDEO_SIZE = {"height": 64, "width": 64, "num_frames": 5}
LTX_SIZE = {"height": 128, "width": 128, "num_frames": 9}
SANA_SIZE = {"height": 32, "width": 32}
UNBINNED = {"use_resolution_binning": False, "negative_prompt": None}

GUIDANCE = {"guided": {"guidance_scale": 4.0}, "unguided": {"guidance_scale": 1.0}}
TRUE_CFG = {"guided": {"true_cfg_scale": 4.0}, "unguided": {"true_cfg_scale": 1.0}}
TWO_GUIDANCES = {"guided": {"guidance_scale": 4.0, "guidance_scale_2": 3.0}, "unguided": {"guidance_scale": 1.0}}
# guidance as an input of the model; the negative prompt takes part when a test passes true_cfg_scale > 1
DISTILLED = {"guided": {"guidance_scale": 5.0}, "unguided": {"guidance_scale": 1.0}}

MASKED = {"mask": "prompt_attention_mask"}
# single prompts have no padding, so the negative one is shorter
UNPADDED = {"mask": "prompt_embeds_mask", "padding": False, "negative_tokens": 4}

FLUX_PARTS = _parts(
    part("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
    image_vae(shift_factor=0.1, scaling_factor=0.36),
    part(
        "FluxTransformer2DModel",
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    ),
)
SD3_PARTS = _parts(
    part("FlowMatchEulerDiscreteScheduler", shift=3.0),
    image_vae(shift_factor=0.06, scaling_factor=1.5),
    part(
        "SD3Transformer2DModel",
        **HEADS,
        **LATENTS,
        sample_size=8,
        num_layers=3,
        joint_attention_dim=TEXT,
        caption_projection_dim=24,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
)
PIXART_PARTS = _parts(
    part("DPMSolverMultistepScheduler", **MILD),
    image_vae(),
    part(
        "PixArtTransformer2DModel",
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=24,
        sample_size=8,
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=TEXT,
    ),
)
DIT_PARTS = _parts(
    part("DDIMScheduler", clip_sample=False, **MILD),
    image_vae(),
    part("DiTTransformer2DModel", **HEADS, in_channels=4, out_channels=8, num_layers=3, sample_size=8),
)
WAN_VAE = part(
    "AutoencoderKLWan",
    **UNSCALED,
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 1, 1],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    scale_factor_spatial=4,
)
WAN_TRANSFORMER = part(
    "WanTransformer3DModel",
    **HEADS,
    **LATENTS,
    text_dim=TEXT,
    freq_dim=16,
    ffn_dim=32,
    num_layers=3,
    rope_max_seq_len=16,
)
WAN_PARTS = _parts(part("UniPCMultistepScheduler", **FLOW), WAN_VAE, WAN_TRANSFORMER)
HUNYUAN_PARTS = _parts(
    part("FlowMatchEulerDiscreteScheduler", shift=7.0),
    part(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        layers_per_block=1,
        **NARROW | {"block_out_channels": (4, 4, 4, 4)},
    ),
    part(
        "HunyuanVideoTransformer3DModel",
        **HEADS,
        **LATENTS,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 4, 4),
    ),
)
QWEN_PARTS = _parts(
    part("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
    part(
        "AutoencoderKLQwenImage",
        **UNSCALED,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
    ),
    part(
        "QwenImageTransformer2DModel",
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 4),
    ),
)
LTX_PARTS = _parts(
    part("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, base_shift=0.95, shift_terminal=0.1),
    part(
        "AutoencoderKLLTXVideo",
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ),
    part(
        "LTXVideoTransformer3DModel",
        **HEADS,
        **LATENTS,
        num_layers=3,
        cross_attention_dim=24,
        caption_channels=TEXT,
    ),
)
SANA_PARTS = _parts(
    part("DPMSolverMultistepScheduler", **FLOW),
    part(
        "AutoencoderDC",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    ),
    part(
        "SanaTransformer2DModel",
        **HEADS,
        **LATENTS,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT,
        sample_size=4,
    ),
)
COG_PARTS = _parts(
    part("CogVideoXDDIMScheduler", prediction_type="v_prediction", timestep_spacing="trailing"),
    part(
        "AutoencoderKLCogVideoX",
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ),
    part(
        "CogVideoXTransformer3DModel",
        **HEADS | {"attention_head_dim": 16},
        **LATENTS,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    ),
)

PIPELINES: tuple[TinyPipeline, ...] = (
    TinyPipeline("flux", maker("FluxPipeline", **FLUX_PARTS), *calls(IMAGE, **DISTILLED, pooled=True)),
    TinyPipeline(
        "flux-img2img",
        maker("FluxImg2ImgPipeline", **FLUX_PARTS),
        *calls(IMAGE, **DISTILLED, pooled=True, image=True),
    ),
    TinyPipeline(
        "sd3",
        maker("StableDiffusion3Pipeline", **SD3_PARTS),
        *calls(IMAGE, **GUIDANCE, pooled=True),
        schedulers=(FLOW_UNIPC, FLOW_DPM, FLOW_HEUN),
    ),
    TinyPipeline(
        "sd3-img2img",
        maker("StableDiffusion3Img2ImgPipeline", **SD3_PARTS),
        *calls(IMAGE, **GUIDANCE, pooled=True, image=True),
    ),
    TinyPipeline(
        "pixart-sigma",
        maker("PixArtSigmaPipeline", **PIXART_PARTS),
        *calls(IMAGE | UNBINNED, **GUIDANCE, **MASKED),
        schedulers=(UNIPC, DDIM, HEUN),
    ),
    TinyPipeline(
        "dit",
        maker("DiTPipeline", **DIT_PARTS),
        lambda n: {"class_labels": [n % 1000], "guidance_scale": 4.0},
        lambda n: {"class_labels": [n % 1000], "guidance_scale": 1.0},
        schedulers=(UNIPC, DPM),
    ),
    TinyPipeline(
        "wan-2.1",
        maker("WanPipeline", **WAN_PARTS),
        *calls(WAN_SIZE, **GUIDANCE),
        schedulers=(FLOW_DPM, FLOW_EULER),
    ),
    TinyPipeline(
        "wan-2.2",
        maker("WanPipeline", **WAN_PARTS, transformer_2=WAN_TRANSFORMER, boundary_ratio=0.875),
        *calls(WAN_SIZE, **TWO_GUIDANCES),
        schedulers=(FLOW_DPM, FLOW_EULER),
    ),
    TinyPipeline(
        "hunyuan-video",
        maker("HunyuanVideoPipeline", **HUNYUAN_PARTS),
        *calls(VIDEO_SIZE, **DISTILLED, **MASKED, pooled=True),
    ),
    TinyPipeline("qwen-image", maker("QwenImagePipeline", **QWEN_PARTS), *calls(IMAGE, **TRUE_CFG, **UNPADDED)),
    TinyPipeline("ltx-video", maker("LTXPipeline", **LTX_PARTS), *calls(LTX_SIZE, **GUIDANCE, **MASKED)),
    TinyPipeline(
        "sana",
        maker("SanaPipeline", **SANA_PARTS),
        *calls(SANA_SIZE | UNBINNED, **GUIDANCE, **MASKED),
        schedulers=(FLOW_UNIPC, FLOW_EULER),
    ),
    TinyPipeline(
        "cogvideox",
        maker("CogVideoXPipeline", **COG_PARTS),
        *calls(VIDEO_SIZE, **GUIDANCE),
        schedulers=(COG_DPM,),
    ),
)
