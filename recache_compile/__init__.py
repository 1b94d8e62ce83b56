"""A compiler for diffusion transformers: budgets in, engines of exactly that cost out."""

from recache_compile._version import __version__
from recache_compile.api import accelerate, compile, inspect, plan
from recache_compile.artifact.rebuild import rebuild
from recache_compile.artifact.store import load
from recache_compile.compiler.build import build_engines
from recache_compile.compiler.compiled import Compiled, Engines
from recache_compile.config import CompileConfig
from recache_compile.errors import RecacheError
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.accelerate import restore

__all__ = [
    "CompileConfig",
    "Compiled",
    "Engines",
    "RecacheError",
    "Schedule",
    "__version__",
    "accelerate",
    "build_engines",
    "compile",
    "inspect",
    "load",
    "plan",
    "rebuild",
    "restore",
]
