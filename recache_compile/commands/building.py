"""Options that tell how engines are built, for the commands that build some."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recache_compile.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from recache_compile.runtimes.base import Runtime

RUNTIME_HELP = "auto, inductor, onnxruntime, tensorrt, tensorrt_rtx or eager."


def tensorrt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of TensorRT and TensorRT-RTX to a command, which takes them as `building`."""
    options = (
        click.option("--target", help="tensorrt_rtx: compute capabilities to build for: sm89,sm120.  [default: sm80 and newer]"),
        click.option("--workspace", type=click.IntRange(1), help="TensorRT: MiB of scratch memory for building."),
        click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT: how long building may search."),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, dir_okay=False),
            help="tensorrt: file that makes building again fast.",
        ),
        click.option("--tf32", is_flag=True, help="TensorRT: float32 products may round their factors to 10 bits."),
        click.option("--version-compatible", is_flag=True, help="TensorRT: engines also run on later versions."),
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
    from recache_compile.runtimes.registry import get_runtime

    given = {option: value for option, value in building.items() if value}
    if not given:
        return get_runtime(name, explain)
    name = name.replace("-", "_")
    if name not in ("tensorrt", "tensorrt_rtx"):
        option = next(iter(given)).replace("_", "-")
        raise RuntimeUnavailableError(f"--{option}: is for runtimes tensorrt and tensorrt_rtx, this is {name}")
    from recache_compile.runtimes.tensorrt import TensorRT

    workspace = given.pop("workspace", None)
    targets = tuple(given.pop("target", "").split(",")) if "target" in given else ()
    return get_runtime(TensorRT(name, targets, None if workspace is None else workspace << 20, **given))
