"""Judges of results: against other implementations, and what is said where one cannot be had."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.evaluation import pretrained
from recache_compile.evaluation.metrics import (
    METRICS,
    features_of_folder,
    features_of_reference,
    judge_of,
    usual_metrics,
)
from recache_compile.models.registry import EMBEDDED
from recache_compile.models.shapes.classifier import load_classifier
from recache_compile.models.shapes.judges import SCENES
from recache_compile.models.shapes.scenes import parse_caption, render
from recache_compile.support.log import told

CAPTIONS = (
    "a red circle left of a blue square on a dark background",
    "a yellow triangle above a magenta ring on a checkered background",
)


def pair(frames: int = 0) -> tuple[Tensor, Tensor]:
    shape = (2, frames, 3, 32, 32) if frames else (2, 3, 32, 32)
    one, other = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    return one, (0.9 * one + 0.1 * other)


def scenes() -> Tensor:
    """Pictures of the captions, as the embedded model should draw them."""
    attributes = torch.tensor([parse_caption(caption).attributes() for caption in CAPTIONS])
    return render(attributes, torch.Generator().manual_seed(0)) / 2 + 0.5


def test_psnr_is_that_of_scikit_image_for_each_picture() -> None:
    made, full = pair()
    expected = [
        peak_signal_noise_ratio(one.double().numpy(), other.double().numpy(), data_range=1)
        for one, other in zip(full, made, strict=True)
    ]
    assert judge_of("psnr", "some/model")(made, full, CAPTIONS).tolist() == pytest.approx(expected)
    assert judge_of("psnr", "some/model")(made, made, CAPTIONS).tolist() == [100.0, 100.0]


def test_ssim_is_that_of_torchmetrics_for_each_picture() -> None:
    made, full = pair()
    expected = [
        float(structural_similarity_index_measure(made[[row]], full[[row]], data_range=1.0)) for row in range(2)
    ]
    assert judge_of("ssim", "some/model")(made, full, CAPTIONS).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_a_video_is_judged_by_its_frames(name: str) -> None:
    made, full = pair(frames=3)
    judge = judge_of(name, "some/model")
    frames = torch.stack([judge(made[:, at], full[:, at], CAPTIONS) for at in range(3)])
    torch.testing.assert_close(judge(made, full, CAPTIONS), frames.mean(0))


def test_attributes_are_the_share_that_the_classifier_reads() -> None:
    pictures = scenes()
    judge = judge_of("attributes", "shapes")
    assert judge(pictures, pictures, CAPTIONS).tolist() == [100.0, 100.0]
    swapped = judge(pictures, pictures, CAPTIONS[::-1])
    attributes = torch.tensor([parse_caption(caption).attributes() for caption in CAPTIONS])
    expected = 100 * (attributes == attributes.flip(0)).double().mean(1)
    assert swapped.tolist() == pytest.approx(expected.tolist())


def test_the_features_of_shapes_are_its_classifiers_averaged_over_space() -> None:
    pictures, classifier = scenes(), load_classifier()
    found = judge_of("fid", "shapes")(pictures, pictures, CAPTIONS)
    expected = classifier.features(pictures * 2 - 1).reshape(2, 64, -1).mean(2)
    torch.testing.assert_close(found, expected)


def test_inception_gets_bytes_and_gives_its_pooled_features(monkeypatch: pytest.MonkeyPatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    pytest.importorskip("torch_fidelity")
    asked: list[object] = []

    class Random(nn.Module):
        def __init__(self, *arguments: object) -> None:
            super().__init__()
            asked.extend(arguments)

        def forward(self, pictures: Tensor) -> Tensor:
            assert pictures.dtype == torch.uint8
            return pictures.float().mean((2, 3))

    monkeypatch.setattr(fid, "NoTrainInceptionV3", Random)
    made, _ = pair()
    found = judge_of("fid", "some/model")(made, made, CAPTIONS)
    assert asked == ["inception-v3-compat", ["2048"]]
    torch.testing.assert_close(found, (made * 255).round().mean((2, 3)))


def test_inception_without_weights_says_where_they_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match=rf"weights-inception.*no network.*{tmp_path}/checkpoints"):
        judge_of("fid", "some/model")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("fid", "torch_fidelity", r"recache-compile\[evaluate\]"), ("vbench", "vbench", "pip install vbench")],
)
def test_a_metric_without_its_package_names_the_command(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeUnavailableError, match=rf"metric {name}: .*{package}.*{install}"):
        judge_of(name, "some/model")


class Bench:
    """A stand-in for `vbench.VBench` with its file format: every dimension scores a video by its brightness."""

    calls: tuple[object, ...] = ()

    def __init__(self, device: object, info: str, output: str) -> None:
        self.output = Path(output)
        assert info.endswith("VBench_full_info.json")

    def evaluate(self, place: str, name: str, prompts: dict[str, str], dimensions: list[str], mode: str) -> None:
        type(self).calls = (list(prompts.values()), dimensions, mode)
        files = sorted(Path(place).glob("*.mp4"), reverse=True)
        assert {str(file) for file in files} == set(prompts)
        scores = {"imaging_quality": 50.0, "dynamic_degree": True}
        rows = {
            each: [
                0.0,
                [{"video_path": str(file), "video_results": scores.get(each, 0.1 * int(file.stem))} for file in files],
            ]
            for each in dimensions
        }
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(rows))


def test_vbench_is_the_mean_of_the_dimensions_of_each_video(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = SimpleNamespace(VBench=Bench, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "vbench", package)
    monkeypatch.setattr(
        "diffusers.utils.export_to_video", lambda frames, file, fps: Path(file).write_bytes(bytes([len(frames), fps]))
    )
    made, full = pair(frames=3)
    found = judge_of("vbench", "some/model")(made, full, CAPTIONS)
    assert found.tolist() == pytest.approx([100 * (0.5 + 1) / 6, 100 * (0.5 + 1 + 4 * 0.1) / 6])
    assert Bench.calls == (list(CAPTIONS), list(pretrained.VBENCH_DIMENSIONS), "custom_input")


def test_vbench_judges_videos_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vbench", SimpleNamespace(__file__=""))
    made, full = pair()
    with pytest.raises(ModelError, match="judges videos, not pictures"):
        judge_of("vbench", "shapes")(made, full, CAPTIONS)


def test_vbench_without_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Offline(Bench):
        def evaluate(self, *_: object, **__: object) -> None:
            raise URLError("no network")

    monkeypatch.setitem(sys.modules, "vbench", SimpleNamespace(VBench=Offline, __file__=str(tmp_path / "__init__.py")))
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, file, fps: None)
    made, full = pair(frames=3)
    with pytest.raises(RuntimeUnavailableError, match=r"metric vbench: .*no network.*leave vbench out"):
        judge_of("vbench", "some/model")(made, full, CAPTIONS)


def test_the_frechet_distance_of_videos_is_that_of_their_middle_frames() -> None:
    made, _ = pair(frames=5)
    judge = judge_of("fid", "shapes")
    torch.testing.assert_close(judge(made, made, CAPTIONS), judge(made[:, 2], made[:, 2], CAPTIONS))


def test_the_reference_of_shapes_is_scenes_of_the_captions() -> None:
    found = features_of_reference(EMBEDDED["shapes"], CAPTIONS)
    assert found.shape == (SCENES, 64)
    drawn = judge_of("fid", "shapes")(scenes(), scenes(), CAPTIONS).double().numpy()
    own = np.linalg.norm(found[0::2].mean(0) - drawn[0]) + np.linalg.norm(found[1::2].mean(0) - drawn[1])
    swapped = np.linalg.norm(found[0::2].mean(0) - drawn[1]) + np.linalg.norm(found[1::2].mean(0) - drawn[0])
    assert own < swapped


def test_unknown_metrics_and_those_of_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="metric 'nice' is unknown; choose psnr, ssim"):
        judge_of("nice", "shapes")
    with pytest.raises(ModelError, match="'attributes' judges pictures of shapes only, not of some/model; choose psnr"):
        judge_of("attributes", "some/model")


def test_usual_metrics_are_those_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lpips", "transformers", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, package, None)
    lines: list[str] = []
    with told(lines.append):
        assert usual_metrics("some/model") == ("psnr", "ssim")
    assert [line.split(":")[:2] for line in lines] == [
        ["left out", f" {name}"] for name in ("distance lpips", "reward clip", "metric fid")
    ]
    assert usual_metrics("shapes") == ("psnr", "ssim", "features", "attributes", "fid")


def test_every_metric_says_what_it_is() -> None:
    assert all(metric.title and metric.name == name for name, metric in METRICS.items())


def test_pictures_of_a_folder_have_the_features_of_results(tmp_path: Path) -> None:
    pictures = scenes()
    for number, picture in enumerate(pictures):
        rows = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(rows).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    found = features_of_folder(tmp_path, "shapes")
    expected = judge_of("fid", "shapes")(pictures, pictures, CAPTIONS).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("files", "says"), [({}, "holds 0 pictures"), ({"a.png": b"x", "b.png": b"y"}, "is no picture")]
)
def test_a_reference_without_pictures_is_refused(files: dict[str, bytes], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        features_of_folder(tmp_path, "shapes")
