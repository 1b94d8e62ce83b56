"""Judge `shapes`: are the captioned attributes recognised in what it draws?

python -m recache_compile.models.shapes.evaluate --captions 256 --grid docs/shapes.png
"""

import json
import random
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor

from recache_compile.models.registry import find
from recache_compile.models.shapes.classifier import SceneClassifier, load_classifier
from recache_compile.models.shapes.scenes import ATTRIBUTES, Scene, render, sample_scene
from recache_compile.pipelines.load import load_pipeline

HELD_OUT_SEED = 2**40
"""Far from training's seeds, which are step numbers."""


def held_out_scenes(count: int, seed: int = HELD_OUT_SEED) -> tuple[list[Scene], Tensor]:
    """Scenes that training's seeds do not draw, and their attributes (count, 6)."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, torch.tensor([scene.attributes() for scene in scenes])


def classifier_accuracy(classifier: SceneClassifier, count: int) -> Tensor:
    """Share of each attribute that is read correctly from rendered scenes, (6,)."""
    _, attributes = held_out_scenes(count)
    pictures = render(attributes, torch.Generator().manual_seed(HELD_OUT_SEED))
    return classifier.recognised(pictures, attributes).float().mean(0)


def draw(captions: list[str], steps: int, batch: int = 64, folder: str = "shapes") -> Tensor:
    """Uncached pictures (captions, 3, 32, 32) in [0, 1]; the seed is the number of the batch."""
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            captions[start : start + batch],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(start),
            output_type="pt",
        ).images
        for start in range(0, len(captions), batch)
    ]
    return torch.cat(drawn)


def tile(pictures: Tensor, columns: int, scale: int = 3, gap: int = 1) -> Image.Image:
    """Pictures (n, 3, H, W) in [0, 1] side by side, enlarged, with white gaps."""
    framed = torch.nn.functional.pad(pictures, (gap, gap, gap, gap), value=1.0)
    rows = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray((rows * 255).round().byte().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


@click.command()
@click.option("--captions", default=256, show_default=True, help="Captions to draw.")
@click.option("--steps", default=50, show_default=True)
@click.option("--folder", default="shapes", show_default=True, help="The pipeline: `shapes` or a folder.")
@click.option("--grid", type=click.Path(path_type=Path), help="Write a picture of the first 40 samples.")
def main(captions: int, steps: int, folder: str, grid: Path | None) -> None:
    """Print one JSON object with the share of attributes recognised."""
    embedded = find(folder)
    classifier = load_classifier(embedded.weights if embedded else Path(folder))
    scenes, attributes = held_out_scenes(captions)
    pictures = draw([scene.caption() for scene in scenes], steps, folder=folder)
    recognised = classifier.recognised(pictures * 2 - 1, attributes).float()
    result = {
        "captions": captions,
        "steps": steps,
        "attributes recognised": recognised.mean().item(),
        "all six recognised": recognised.prod(1).mean().item(),
        "by attribute": dict(zip(ATTRIBUTES, recognised.mean(0).tolist(), strict=True)),
        "classifier on held-out scenes": classifier_accuracy(classifier, 4096).mean().item(),
    }
    click.echo(json.dumps(result, indent=1))
    if grid:
        grid.parent.mkdir(parents=True, exist_ok=True)
        tile(pictures[:40], columns=10).save(grid)


if __name__ == "__main__":
    main()
