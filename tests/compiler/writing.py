"""A runtime that writes programs down; light to import, as helper processes do."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import override

from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_to_json
from recache_compile.runtimes.base import Engine, Runtime
from recache_compile.runtimes.eager import Eager

LOWERED: list[str] = []
"""Names of the programs that this process has lowered."""


@dataclass(frozen=True, slots=True)
class Written(Runtime):
    """Writes programs down, runs them eagerly, and can be kept on disk.

    Args:
        facts: what else its files follow from.
        owner: a process that others lower for; 0: none does.
        elsewhere: what happens in these others.
    """

    name: str = "eager"
    capturable = False
    facts: Mapping[str, str] = field(default_factory=dict)
    owner: int = 0
    elsewhere: Literal["written", "dies", "hangs", "fails", "differs"] = "written"

    @override
    def files(self, variant: int, program: str) -> tuple[str, ...]:
        return (f"engines/{variant}/{program}.txt", f"engines/{variant}/{program}.process")

    @override
    def lowering_facts(self, device: torch.device) -> Mapping[str, str]:
        differs = self.elsewhere == "differs" and os.getpid() != self.owner
        return {"other": "machine"} if differs else self.facts

    @override
    def lowers_apart(self, device: torch.device) -> bool:
        return bool(self.owner)

    @override
    def require(self, building: bool) -> None:
        return

    @override
    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        LOWERED.append(program.name)
        if self.owner == os.getpid():
            time.sleep(0.5)  # the others get their share
        elif self.owner and self.elsewhere == "dies":
            os._exit(3)
        elif self.owner and self.elsewhere == "hangs":
            time.sleep(600)
        elif self.owner and self.elsewhere == "fails":
            raise RuntimeError("not here")
        files[0].write_text(program_to_json(program), encoding="utf-8")
        files[1].write_text(str(os.getpid()), encoding="utf-8")

    @override
    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, torch.Tensor], device: torch.device
    ) -> Engine:
        assert files[0].read_text(encoding="utf-8") == program_to_json(program)
        return Eager().load(program, (), weights, device)
