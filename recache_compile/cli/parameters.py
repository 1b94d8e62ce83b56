"""Types of command-line parameters."""

import json
import math
from typing import Any

import click
from typing_extensions import override

from recache_compile.errors import ModelError, ScheduleError


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, separated by commas."""

    name = "N,N,..."

    def __init__(self, what: str, minimum: int | None = None) -> None:
        self.what, self.minimum = what, minimum

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            raise ScheduleError(f"{self.what} {value!r}: expected whole numbers such as 5,10,15") from None
        if self.minimum is not None and min(numbers) < self.minimum:
            raise ScheduleError(f"{self.what} {value!r}: expected {self.minimum} or more")
        return numbers


class Budgets(click.ParamType):  # type: ignore[type-arg]
    """Numbers of recompute steps, or shares of all steps, separated by commas: 5,10 or 20%,0.5."""

    name = "K,K,..."

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | float, ...]:
        return value if isinstance(value, tuple) else tuple(map(_budget, str(value).split(",")))


BUDGETS = click.option(
    "--budgets",
    type=Budgets(),
    default="5,10,15",
    show_default=True,
    help="Recompute steps k, or shares of all steps: 20%.",
)
"""Of the commands that only look at schedules."""


class Budget(click.ParamType):  # type: ignore[type-arg]
    """One of them."""

    name = "K"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        return value if isinstance(value, (int, float)) else _budget(str(value))


def _budget(text: str) -> int | float:
    """A whole number, or a share such as 0.2 or 20%."""
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ScheduleError(
            f"budgets {text!r}: expected whole numbers such as 5,10,15, or shares of the steps such as 20%"
        ) from None


class Words(click.ParamType):  # type: ignore[type-arg]
    """Words, separated by commas."""

    name = "WORD,WORD,..."

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return (
            value if isinstance(value, tuple) else tuple(word.strip() for word in str(value).split(",") if word.strip())
        )


def check_finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Callback of options that are numbers: neither infinite nor not a number."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.", ctx, param)
    return value


class Size(click.ParamType):  # type: ignore[type-arg]
    """WIDTHxHEIGHT in pixels."""

    name = "WIDTHxHEIGHT"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        width, _, height = str(value).partition("x")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise ModelError(f"size {value!r}: expected WIDTHxHEIGHT in pixels, such as 1024x768")
        return int(width), int(height)


def check_call(call: dict[str, Any], batch: tuple[int, ...]) -> None:
    """Refuse arguments of the pipeline that the command line decides itself.

    Raises:
        ModelError: naming the argument.
    """
    own = {"num_inference_steps": "use --steps", "generator": "use --seed", "output_type": "pictures are compared"}
    for name, reason in own.items():
        if name in call:
            raise ModelError(f"call: {name} cannot be set here; {reason}")
    if batch != (1,) and any(name.startswith("prompt") for name in call):
        raise ModelError("call: with a prompt of its own, its batch is the batch; leave --batch out")


def check_many_prompts(call: dict[str, Any], workers: int, ray_address: str | None) -> None:
    """Refuse what makes no sense where many prompts are drawn, perhaps by other processes.

    Raises:
        ModelError: naming the argument or option.
    """
    check_call(call, (1,))
    if any(name.startswith("prompt") for name in call):
        raise ModelError("call: a prompt cannot be set here; use --prompts, a file with many")
    if ray_address and not workers:
        raise ModelError("--ray-address: name the number of its processes too, --workers N")


class JsonObject(click.ParamType):  # type: ignore[type-arg]
    """One JSON object."""

    name = "JSON"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise ModelError(f"call {value!r}: is no JSON ({error})") from None
        if not isinstance(parsed, dict):
            raise ModelError(f'call {value!r}: expected a JSON object, such as {{"guidance_scale": 3.5}}')
        return parsed
