"""Loading a pipeline by name, folder or Hub id."""

import json
from pathlib import Path

import pytest

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.pipelines.load import load_pipeline


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(ModelError, match="holds no pipeline"):
        load_pipeline(str(tmp_path / "index"))
    with pytest.raises(ModelError, match="not an embedded model"):
        load_pipeline("no such model")


def test_a_damaged_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_pipeline(str(tmp_path))


def test_a_missing_optional_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.0",
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("recache_compile.pipelines.load.find_spec", lambda name: None)
    with pytest.raises(
        RuntimeUnavailableError, match=r"text_encoder needs the package transformers; pip install .*\[hub\]"
    ):
        load_pipeline(str(tmp_path))
