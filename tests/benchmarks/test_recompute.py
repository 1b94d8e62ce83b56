"""The benchmark of a recompute step's parts runs; no time is asserted."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from recache_compile.ir.cost import count_macs
from recache_compile.passes.simplify import Simplify
from tests.conftest import flux_inputs, tiny_flux
from tests.passes.tiny import captured

ROOT = Path(__file__).parent.parent.parent


def test_products_and_attention_are_all_that_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from recompute import attention_shapes, product_shapes

    program = Simplify()(captured(tiny_flux(), flux_inputs())[0]).program
    attention = sum(2 * prod(queries) * keys[-2] for queries, keys in attention_shapes(program))
    macs = sum(map(prod, product_shapes(program))) + attention
    assert macs == count_macs(program, torch.device("cpu"))


@pytest.mark.slow
def test_a_step_is_taken_apart(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--models", "flux-small", "--dtypes", "float32", "--threads", "1", "--rounds", "2", "--json", str(file))
    command = [sys.executable, "benchmarks/recompute.py", *options]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(file.read_text())["lines"]
    assert line["step"] == pytest.approx(line["products"] + line["attention"] + line["rest"])
    assert line["limit"] == pytest.approx(line["macs"] / line["macs_per_second"])
    assert "flux-small, float32" in done.stdout
