"""Measurements in processes of their own, and where they were made."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def answer_of(script: str, options: Sequence[str], environment: Mapping[str, str]) -> Any:
    """The JSON that a script prints last.

    Args:
        script: its file.
        options: of its command line.
        environment: variables that differ from those of this process.
    """
    done = subprocess.run(
        [sys.executable, script, *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


def conditions() -> dict[str, Any]:
    """The machine, torch's version and the date; libraries are loaded here, so that a script may measure that."""
    import torch

    from recache_compile.support.machine import machine

    return {"machine": machine("cpu"), "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def write(found: Mapping[str, Any], file: Path | None) -> None:
    """Write what was measured so far, if it shall be written: it stays, whatever comes next."""
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
