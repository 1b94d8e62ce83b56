"""What the package knows about the models that ship with it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recache_compile.errors import ModelError
from recache_compile.evaluation.distances import get_distance
from recache_compile.evaluation.metrics import METRICS, judge_of, usual_metrics
from recache_compile.evaluation.rewards import get_reward
from recache_compile.models.registry import EMBEDDED, EmbeddedModel, OwnJudge, find, find_pipeline, owner_of
from recache_compile.pipelines.load import absolute
from recache_compile.pipelines.prompts import captions_of, training_and_held_out

MODELS = pytest.mark.parametrize("model", EMBEDDED.values(), ids=EMBEDDED)
ROOT = Path(__file__).parent.parent.parent


@MODELS
def test_an_entry_is_true(model: EmbeddedModel) -> None:
    code = model.code()
    index = json.loads((model.weights / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == code.pipeline_class().__name__ == model.pipeline
    assert list(model.policies.glob("*/policy.json"))
    for caption in (*model.captions, *code.captions()[:20]):
        code.check_caption(caption)
    assert set(model.metrics) <= set(METRICS)
    assert get_distance("auto", model.name).name == model.distance


@MODELS
def test_its_judges_judge_what_it_draws(model: EmbeddedModel) -> None:
    pictures, captions = torch.rand(2, 3, *[model.code().PICTURE_SIZE] * 2), model.captions[:2]
    for judge in model.judges:
        assert METRICS[judge.name].higher == (judge.kind == "reward")
        assert judge_of(judge.name, model.name)(pictures, pictures, captions).shape == (2,)
    found = model.code().features()(pictures)
    assert found.shape == (2, model.code().reference_features(captions).shape[1])


@MODELS
def test_it_is_found_by_name_pipeline_and_judge(model: EmbeddedModel) -> None:
    assert find(model.name) is find_pipeline(model.pipeline) is model
    assert all(owner_of(judge.name) is model for judge in model.judges)


def test_others_are_not_embedded() -> None:
    assert find("some/model") is find_pipeline("FluxPipeline") is owner_of("lpips") is None


class Dots:
    """The code of a second model, that draws dots."""

    PICTURE_SIZE = 4

    def pipeline_class(self) -> type:
        return dict

    def captions(self) -> tuple[str, ...]:
        return ("one dot", "two dots", "three dots")

    def check_caption(self, caption: str) -> None:
        if not caption.endswith(("dot", "dots")):
            raise ValueError(f"caption {caption!r}: tells no dots")

    def distance(self, name: str) -> object:
        return lambda pictures, reference: (pictures - reference).abs().flatten(1).amax(1)

    def reward(self, name: str) -> object:
        raise AssertionError(name)

    def features(self) -> object:
        return lambda pictures: pictures.flatten(1)

    def reference_features(self, captions: object) -> Tensor:
        return torch.zeros(8, 48)


def test_a_second_model_is_one_more_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    dots = replace(
        EMBEDDED["shapes"], name="dots", pipeline="DotsPipeline", judges=(OwnJudge("holes", "distance", "", False, "-"),),
        distance="holes", metrics=("psnr", "fid"), code=Dots,
    )  # fmt: skip
    monkeypatch.setitem(EMBEDDED, "dots", dots)
    pictures = torch.rand(2, 3, 4, 4)
    assert get_distance("auto", "dots").name == "holes"
    assert get_distance("holes", "dots")(pictures, pictures).tolist() == [0, 0]
    with pytest.raises(
        ModelError, match="distance 'features' judges pictures of shapes only, not of dots; choose auto"
    ):
        get_distance("features", "dots")
    with pytest.raises(ModelError, match="reward 'caption' judges pictures of shapes only, not of dots; choose none"):
        get_reward("caption", "dots")
    assert usual_metrics("dots") == ("psnr", "fid")
    assert torch.equal(judge_of("fid", "dots")(pictures, pictures, ("one dot",) * 2), pictures.flatten(1))
    assert training_and_held_out("dots", None) == (("one dot",), ("two dots", "three dots"))
    assert captions_of("dots", None) == ("two dots", "three dots")
    assert absolute("dots") == "dots"


def test_no_other_file_of_the_package_asks_for_a_model_by_name() -> None:
    files = {file for file in (ROOT / "recache_compile").rglob("*.py") if "models" not in file.parts}
    told = [file.name for file in sorted(files) if '"shapes"' in file.read_text(encoding="utf-8")]
    assert not told


def test_the_registry_imports_no_model() -> None:
    code = "import sys, recache_compile.models.registry; print([name for name in sys.modules if '.shapes' in name])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
