"""Options that tell how engines are built, for the commands that build some."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recache_compile.errors import RuntimeUnavailableError
from recache_compile.support.disk_cache import DEFAULT_SIZE, VARIABLE, bytes_of, limited_to

if TYPE_CHECKING:
    from recache_compile.runtimes.base import Runtime

BOTH = ("tensorrt", "tensorrt_rtx")
OPTIONS_OF = {
    "target": ("tensorrt_rtx",),
    "workspace": BOTH,
    "optimization_level": BOTH,
    "timing_cache": ("tensorrt",),
    "tf32": BOTH,
    "version_compatible": ("tensorrt",),
    "hardware_compatible": ("tensorrt",),
}
"""Runtimes that an option is for."""

RUNTIME_HELP = "auto, inductor, onnxruntime, tensorrt, tensorrt_rtx or eager."


def _limit_cache(ctx: click.Context, param: click.Parameter, size: str | None) -> None:
    if size is not None:
        ctx.with_resource(limited_to(bytes_of(size)))


cache_size_option = click.option(
    "--cache-size",
    callback=_limit_cache,
    expose_value=False,
    help="Most that lowered programs may take in the cache on disk, such as 20GB; 0 keeps and reads none."
    f"  [default: {VARIABLE}, else {DEFAULT_SIZE}]",
)
"""Holds while the command runs."""


def tensorrt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of TensorRT and TensorRT-RTX to a command, which takes them as `building`."""
    options = (
        click.option(
            "--target",
            help="tensorrt_rtx: compute capabilities: sm89,sm120.  [default: this GPU, else all known from sm80 on]",
        ),
        click.option("--workspace", type=click.IntRange(1), help="TensorRT: MiB of scratch memory for building."),
        click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT: how long building may search."),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, dir_okay=False),
            help="tensorrt: file that makes building again fast.",
        ),
        click.option("--tf32", is_flag=True, help="TensorRT: float32 products may round their factors to 10 bits."),
        click.option("--version-compatible", is_flag=True, help="tensorrt: engines also run on later versions."),
        click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines also run on other GPUs."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen_runtime(name: str, building: dict[str, Any], explain: Callable[[str], None]) -> "Runtime":
    """The runtime that a command line asks for.

    Args:
        name: of the runtime.
        building: values of `tensorrt_options`.
        explain: told why "auto" did not take the first.

    Raises:
        RuntimeUnavailableError: it is not usable here, or the options are not its own.
    """
    from recache_compile.runtimes.registry import get_runtime, known_runtime

    given = {option: value for option, value in building.items() if value is not None and value is not False}
    name = name if name == "auto" else known_runtime(name).name
    for option in given:
        if name not in OPTIONS_OF[option]:
            raise RuntimeUnavailableError(
                f"--{option.replace('_', '-')}: is for runtime {' and '.join(OPTIONS_OF[option])}, this is {name}"
            )
    if not given:
        return get_runtime(name, explain)
    from recache_compile.runtimes.tensorrt import TensorRT, TensorRTForRTX

    workspace, level, tf32 = given.get("workspace"), given.get("optimization_level"), "tf32" in given
    scratch = None if workspace is None else workspace << 20
    if name == "tensorrt_rtx":
        targets = tuple(given["target"].split(",")) if "target" in given else ()
        return get_runtime(TensorRTForRTX(targets=targets, workspace=scratch, optimization_level=level, tf32=tf32))
    return get_runtime(
        TensorRT(
            workspace=scratch,
            optimization_level=level,
            tf32=tf32,
            timing_cache=given.get("timing_cache"),
            version_compatible="version_compatible" in given,
            hardware_compatible="hardware_compatible" in given,
        )
    )
