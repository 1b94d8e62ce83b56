"""Train `shapes` from scratch: the judge first, then the pipeline.

    python -m recache_compile.models.shapes.train --output FOLDER

Everything is drawn by code (`scenes`), step n from seed n, so an interrupted run that is
started again with the same folder goes on where it was and ends with the same data seen.
"""

import copy
import math
import random
from pathlib import Path

import click
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from recache_compile.models.shapes.classifier import SceneClassifier
from recache_compile.models.shapes.pipeline import ShapesPipeline, ShapesTextEncoder, pack, position_ids
from recache_compile.models.shapes.scenes import SIZE, WORDS, render, sample_scene

WIDTH = 128
SAVE_EVERY = 250
"""Steps between two saved states."""


def scenes_of(seed: int, batch: int) -> tuple[list[str], Tensor, Tensor]:
    """Captions, attributes (batch, 6) and pictures (batch, 3, 32, 32) of one seed."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(batch)]
    attributes = torch.tensor([scene.attributes() for scene in scenes])
    pictures = render(attributes, torch.Generator().manual_seed(seed))
    return [scene.caption() for scene in scenes], attributes, pictures


def new_pipeline() -> ShapesPipeline:
    """The untrained pipeline: 2 double and 4 single FLUX blocks of width 128."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    text_encoder = ShapesTextEncoder(words=WORDS, width=WIDTH)
    return ShapesPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder)


def flow_matching_loss(pipeline: ShapesPipeline, seed: int, batch: int, device: torch.device) -> Tensor:
    """Mean squared error of the velocity `noise - picture` (rectified flow, arXiv 2209.03003).

    Noise levels are logit-normal (arXiv 2403.03206, equation 19, location 0.3); one caption
    in ten is dropped for classifier-free guidance.
    """
    captions, _, pictures = scenes_of(seed, batch)
    generator = torch.Generator().manual_seed(seed)
    clean = pack(pictures).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) + 0.3).to(device)
    dropped = torch.rand(batch, generator=generator) < 0.1
    prompts = ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
    states, pooled = pipeline.text_encoder(pipeline.text_encoder.tokenize(prompts))
    velocity = pipeline.transformer(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=position_ids(SIZE, device),
        txt_ids=torch.zeros(states.shape[1], 3, device=device),
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - clean)


def optimizers(modules: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in modules.named_parameters():
        hidden = parameter.ndim == 2 and ("blocks" in name or "layers" in name)
        (matrices if hidden else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the run, then a half cosine to zero."""
    return min(1.0, (step + 1) / (0.02 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def train_pipeline(
    state_file: Path, steps: int, batch: int, device: torch.device, progress: Progress
) -> ShapesPipeline:
    """Train for `steps` steps and return the pipeline with averaged weights."""
    torch.manual_seed(0)
    pipeline = new_pipeline().to(device)
    live = nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder})
    average = copy.deepcopy(live).requires_grad_(False)
    methods = optimizers(live)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        live.load_state_dict(state["live"])
        average.load_state_dict(state["average"])
        for method, saved in zip(methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        first = state["step"]
    rates = [[group["lr"] for group in method.param_groups] for method in optimizers(live)]

    task = progress.add_task("pipeline", total=steps, completed=first)
    smooth = None
    for step in range(first, steps):
        loss = flow_matching_loss(pipeline, step, batch, device)
        loss.backward()
        nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        for method, base in zip(methods, rates, strict=True):
            for group, rate in zip(method.param_groups, base, strict=True):
                group["lr"] = rate * learning_rate(step, steps)
            method.step()
            method.zero_grad()
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), live.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        progress.update(task, advance=1, description=f"pipeline  loss {smooth:.4f}")
        if (step + 1) % SAVE_EVERY == 0:
            progress.console.print(f"step {step + 1}: loss {smooth:.4f}")
            _save_state(
                state_file,
                {
                    "live": live.state_dict(),
                    "average": average.state_dict(),
                    "methods": [method.state_dict() for method in methods],
                    "step": step + 1,
                },
            )
    live.load_state_dict(average.state_dict())
    return pipeline


def train_classifier(steps: int, batch: int, device: torch.device, progress: Progress) -> SceneClassifier:
    """Train the judge on rendered scenes with a little noise."""
    torch.manual_seed(0)
    model = SceneClassifier().to(device)
    method = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    task = progress.add_task("classifier", total=steps)
    for step in range(steps):
        _, attributes, pictures = scenes_of(step, batch)
        noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(step))
        logits = model(noisy.to(device))
        targets = attributes.to(device).unbind(1)
        loss = torch.stack([functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]).sum()
        loss.backward()
        method.param_groups[0]["lr"] = 2e-3 * learning_rate(step, steps)
        method.step()
        method.zero_grad()
        progress.update(task, advance=1, description=f"classifier  loss {loss.item():.4f}")
    return model.eval()


def _save_state(file: Path, state: dict[str, object]) -> None:
    partial = file.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(file)


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", default=8000, show_default=True, help="Steps of the pipeline's training.")
@click.option("--batch", default=64, show_default=True, help="Scenes in a step.")
@click.option("--classifier-steps", default=2000, show_default=True, help="Steps of the classifier's training.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(output: Path, steps: int, batch: int, classifier_steps: int, device: str) -> None:
    """Train the embedded model and its judge; start again with the same folder to resume."""
    output.mkdir(parents=True, exist_ok=True)
    target = torch.device(device)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        if not (output / "classifier" / "config.json").exists():
            classifier = train_classifier(classifier_steps, batch, target, progress)
            classifier.half().save_pretrained(output / "classifier")
        pipeline = train_pipeline(output / "training_state.pt", steps, batch, target, progress)
    pipeline.to(torch.float16).save_pretrained(output)


if __name__ == "__main__":
    main()
