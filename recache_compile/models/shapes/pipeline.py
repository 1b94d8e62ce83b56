"""The embedded text-to-image pipeline: a small FLUX transformer that draws in pixel space.

The picture is its own latent: 32x32 RGB packed into 64 tokens of 4x4 pixels (48 channels).
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from recache_compile.errors import RecacheError

PATCH = 4


class ShapesTextEncoder(ModelMixin, ConfigMixin):
    """Word-level encoder: word and position embeddings, then transformer layers.

    Args:
        words: the vocabulary; index 0 of the embedding is padding.
        max_length: captions are padded to this many words.
        width: size of a token's embedding.
        num_layers, num_heads: of the transformer encoder (pre-norm).
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, words: tuple[str, ...], max_length: int = 12, width: int = 128, num_layers: int = 1, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.index = {word: number for number, word in enumerate(words, start=1)}
        self.embedding = nn.Embedding(len(words) + 1, width)
        self.position = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, width * 2, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Word numbers, integer tensor (batch, max_length); the empty prompt is all padding.

        Raises:
            RecacheError: a word is unknown or a prompt has too many words.
        """
        length = self.config.max_length
        rows = []
        for prompt in prompts:
            words = prompt.lower().split()
            unknown = sorted({word for word in words if word not in self.index})
            if unknown:
                raise RecacheError(f"prompt {prompt!r}: unknown {unknown}; this model knows {', '.join(self.index)}")
            if len(words) > length:
                raise RecacheError(f"prompt {prompt!r} has {len(words)} words; this model reads at most {length}")
            rows.append([self.index[word] for word in words] + [0] * (length - len(words)))
        return torch.tensor(rows, device=self.device)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token states (batch, max_length, width) and their mean (batch, width)."""
        states = self.embedding(tokens) + self.position
        for layer in self.layers:
            states = layer(states)
        states = self.norm(states)
        return states, states.mean(1)


def pack(pictures: Tensor) -> Tensor:
    """(batch, 3, H, W) to tokens (batch, H/4 * W/4, 48)."""
    batch, channels, height, width = pictures.shape
    tiles = pictures.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // PATCH**2, channels * PATCH**2)


def unpack(tokens: Tensor, size: int) -> Tensor:
    """Inverse of `pack` for square pictures of `size` pixels."""
    side = size // PATCH
    tiles = tokens.reshape(len(tokens), side, side, -1, PATCH, PATCH)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, size, size)


def position_ids(size: int, device: torch.device | str | None = None) -> Tensor:
    """FLUX's image ids (tokens, 3): zero, row, column."""
    axis = torch.arange(size // PATCH, device=device, dtype=torch.float32)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)


class ShapesPipeline(DiffusionPipeline):
    """Caption to 32x32 picture, in the manner of `FluxPipeline` without an autoencoder."""

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: ShapesTextEncoder,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)
        self.default_sample_size = 32

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: one caption or several.
            num_inference_steps: denoising steps T.
            guidance_scale: classifier-free guidance; 1 runs the conditional branch alone.
            num_images_per_prompt: pictures for each caption.
            generator: source of the initial noise.
            latents: the initial noise itself, (batch, 64, 48).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})`.
        """
        prompts = [
            text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images_per_prompt)
        ]
        device, size = self._execution_device, self.default_sample_size
        dtype = self.transformer.dtype
        if latents is None:
            shape = (len(prompts), (size // PATCH) ** 2, 3 * PATCH**2)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        ids = {
            "img_ids": position_ids(size, device).to(dtype),
            "txt_ids": torch.zeros(self.text_encoder.config.max_length, 3, device=device, dtype=dtype),
        }
        branches = {"cond": self._encode(prompts)}
        if guidance_scale != 1.0:
            branches["uncond"] = self._encode([""] * len(prompts))

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                predictions = {}
                for name, encoded in branches.items():
                    with self.transformer.cache_context(name):
                        predictions[name] = self.transformer(
                            hidden_states=latents,
                            timestep=timestep.expand(len(prompts)).to(dtype) / 1000,
                            return_dict=False,
                            **encoded,
                            **ids,
                        )[0]
                prediction = predictions["cond"]
                if "uncond" in predictions:
                    prediction = torch.lerp(predictions["uncond"], prediction, guidance_scale)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
                progress.update()
        if output_type == "latent":
            images: Any = latents
        else:
            images = self.image_processor.postprocess(unpack(latents, size).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled = self.text_encoder(self.text_encoder.tokenize(prompts))
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
