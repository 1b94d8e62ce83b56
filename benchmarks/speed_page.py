"""Write docs/benchmarks.md from the results of the scripts beside this one, `bench --json` and `evaluate`.

python benchmarks/speed_page.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from recache_compile.evaluation.metrics import METRICS
from recache_compile.evaluation.result import EvaluationResult
from recache_compile.evaluation.statistics import Estimate
from recache_compile.evaluation.wording import UNSURE, percent, plain, target_line
from recache_compile.support.files import writing

HERE = Path(__file__).parent
MODELS = {
    "flux-small": "2 double and 4 single blocks, width 128, 64 image and 16 text tokens",
    "flux-medium": "4 double and 8 single blocks, width 512, 256 image and 64 text tokens",
    "wan-small": "6 blocks of width 256, 32 tokens of video, cross-attention to 32 of text",
    "sd3-small": "6 joint blocks of width 256, 64 image and 32 text tokens",
    "shapes": "the embedded pipeline's transformer with its weights",
}
"""What is measured beside other caches, in the order of the page."""

NOTICEABLE = 0.5
"""Seconds from which a stage counts where growth is told."""


def write_page(folder: Path, docs: Path) -> None:
    """Fill the template with every part that has a result."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    parts = {
        "loop": loop_part(results["loop"]),
        "loop-wide": wide_part(results["loop-wide"]),
        "recompute": recompute_part(results["recompute"]),
        "dispatch": dispatch_part(results["dispatch"]),
        "scale": "\n\n".join(scale_part(name, results[name]) for name in ("scale", "scale-eager")),
        "adapters": adapters_part({name: results[name] for name in ("adapters", "adapters-bfloat16")}),
        "batching": batching_part(results["batching"]),
        "free-sizes": free_sizes_part(results["free-sizes"]),
        "first-result": first_part(results["first-result"]),
        "quality": quality_part(results["evaluate-shapes"]),
        "bench": "\n\n".join(bench_part(results[f"bench-{name}"]) for name in MODELS if f"bench-{name}" in results),
    }
    text = (HERE / "speed.md").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    with writing(docs / "benchmarks.md") as partial:
        partial.write_text(text, encoding="utf-8")


def loop_part(result: Mapping[str, Any]) -> str:
    """Who takes how long, and what of it is overhead."""
    loops = [
        [name, f"{taken:.2f} s", f"{low:.2f} to {high:.2f} s", f"× {result['ratio_to_eager'][name]:.2f}"]
        for name, taken in result["seconds"].items()
        for low, high in [result["spread"][name]]
    ]
    runtimes = [
        [
            name, f"{each['build_seconds']:.0f} s", *(milliseconds(each[what]) for what in ("recompute_step", "cached_step", "prologue")),
            f"{each['generation_over_ideal']:.3f}", f"{each['artifact_over_weights']:.3f}", f"{each['held_over_model']:.3f}",
        ]
        for name, each in result["runtimes"].items()
    ]  # fmt: skip
    what = (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, {result['rounds']} rounds"
        " ([numbers](../benchmarks/results/loop.json)); multiply-accumulates per generation ÷"
        f" {result['macs_reduction']:.2f}:"
    )
    columns = (
        "runtime", "built in", "recompute step", "cached step", "prologue", "generation / ideal", "disk / weights",
        "memory / model",
    )  # fmt: skip
    return "\n\n".join((what, table(("loop", "median", "min to max", "speed"), loops), table(columns, runtimes)))


def wide_part(result: Mapping[str, Any]) -> str:
    """The same with more weights."""
    each = [
        f"{name} {runtime['artifact_over_weights']:.3f} and {runtime['held_over_model']:.3f}"
        for name, runtime in result["runtimes"].items()
    ]
    weights = next(iter(result["runtimes"].values()))["weight_bytes"]
    return (
        f"With {weights / 1e9:.2f} GB of weights (`--width 1024 --tokens 64 --steps 4 --budget 2`,"
        f" [numbers](../benchmarks/results/loop-wide.json)) disk / weights and memory / model are: {', '.join(each)}."
    )


def recompute_part(result: Mapping[str, Any]) -> str:
    """What a step is made of, as shares, and against the machine's limit."""
    rows = [
        [
            f"{line['model']}, {line['dtype']}", str(line["threads"]), milliseconds(line["step"]),
            *(f"{line[part] / line['step']:.0%}" for part in ("products", "attention", "rest")),
            milliseconds(line["limit"]), f"{line['step'] / line['limit']:.2f}", f"{line['products_over_limit']:.2f}",
        ]
        for line in result["lines"]
    ]  # fmt: skip
    columns = (
        "", "threads", "recompute step", "products", "attention", "rest", "limit", "step / limit", "products / their limit",
    )  # fmt: skip
    return (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, {result['rounds']} rounds, with"
        f" {result['load']:.0f} processes waiting for the machine's cores"
        f" ([numbers](../benchmarks/results/recompute.json)):\n\n{table(columns, rows)}"
    )


def dispatch_part(result: Mapping[str, Any]) -> str:
    """Microseconds of a step by the number of guidance branches."""
    kinds = next(iter(result["microseconds"].values()))
    rows = [[name, *(f"{each[kind]:.1f} us" for kind in kinds)] for name, each in result["microseconds"].items()]
    return (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, T = {result['steps']}, k ="
        f" {result['budget']}, medians ([numbers](../benchmarks/results/dispatch.json)):\n\n{table(('', *kinds), rows)}"
    )


def adapters_part(by_name: Mapping[str, Mapping[str, Any]]) -> str:
    """What a change takes, by the type of the weights and what adapters are on."""
    rows = []
    for result in by_name.values():
        for where, each in result["seconds"].items():
            swap = each["swap"]["processor"]
            rows.append([
                result["dtype"], where, f"{each['changed'] / each['parameters']:.0%}", f"{swap:.2f} s",
                f"{1e9 * swap / each['parameters']:.2f} s", f"{each['two at once']['processor']:.2f} s",
                f"{each['refit']['processor']:.2f} s", f"{each['swap']['median']:.2f} s",
            ])  # fmt: skip
    columns = (
        "weights", "adapters on", "of the weights", "a change", "per 1e9 parameters", "two at once", "refit",
        "a change, wall clock",
    )  # fmt: skip
    first = next(iter(by_name.values()))
    links = ", ".join(f"[{each['dtype']}](../benchmarks/results/{name}.json)" for name, each in by_name.items())
    return f"Measured on {first['date']}, {first['machine']} ({links}):\n\n{table(columns, rows)}"


def free_sizes_part(result: Mapping[str, Any]) -> str:
    """Engines for any size beside those for one, by model and runtime."""
    rows = []
    for model, runtimes in result["models"].items():
        for runtime, each in runtimes.items():
            recompute, prologue = (each["programs"][name] for name in ("recompute", "prologue"))
            fixed, free = milliseconds(recompute["fixed"]), milliseconds(recompute["free"])
            rows.append([model, runtime, fixed, free, f"{recompute['ratio']:.3f}", f"{prologue['ratio']:.3f}"])
    columns = ("", "runtime", "recompute step, fixed", "free", "free / fixed", "prologue, free / fixed")
    return (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, medians of {result['rounds']}"
        f" rounds ([numbers](../benchmarks/results/free-sizes.json)):\n\n{table(columns, rows)}"
    )


def batching_part(result: Mapping[str, Any]) -> str:
    """Seconds of every way, and the sizes of the calls."""
    rows = [[name, f"{seconds:.3f} s"] for name, seconds in result["seconds"].items()]
    calls = ", ".join(f"{count} of {size}" for size, count in result["requests_per_call"].items())
    return (
        f"Measured on {result['date']}, {result['machine']}, {result['threads']} threads, {result['runtime']},"
        f" {result['requests']} requests of budget {result['budget']}, max_wait_ms {result['max_wait_ms']:g},"
        f" {result['rounds']} rounds ([numbers](../benchmarks/results/batching.json)):\n\n"
        f"{table(('', 'median'), rows)}\n\nSo {result['requests']} requests take 1 / {result['throughput']:.2f} of the"
        f" time, and a lone one {result['lone_latency']:.3f} of it; recompute calls by their requests: {calls}. The"
        f" largest difference of a pixel (0 to 1) to the request alone is {result['largest_error']:.1g}."
    )


def scale_part(name: str, result: Mapping[str, Any]) -> str:
    """Every stage and size by model, and what grows faster than the blocks; `name` is the result's."""
    models: Mapping[str, Any] = result["models"]
    stages = dict.fromkeys(stage for each in models.values() for stage in each["stages"])
    rows = [
        [stage, *(f"{each['stages'][stage]:.2f} s" if stage in each["stages"] else "" for each in models.values())]
        for stage in stages
    ]
    rows += [
        ["calls in the largest program", *(str(max(each["nodes"].values())) for each in models.values())],
        ["weights", *(f"{each['weight_bytes'] / 1e6:.0f} MB" for each in models.values())],
        ["peak memory", *(f"{each['peak_bytes'] / 1e6:.0f} MB" for each in models.values())],
        ["peak beyond libraries / weights", *(f"{each['peak_over_weights']:.2f}" for each in models.values())],
        ["disk / weights", *(f"{each['artifact_bytes'] / each['weight_bytes']:.3f}" for each in models.values())],
        ["one generation", *(seconds(each["generation"]["ours"]) for each in models.values())],
        ["uncached, eager", *(seconds(each["generation"]["eager"]) for each in models.values())],
    ]
    header = ("", *(f"{model} blocks" if each["blocks"] else model for model, each in models.items()))
    return (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, `--models"
        f" {','.join(models)} --runtime {result['runtime']} --rounds {result['rounds']}`"
        f" ([numbers](../benchmarks/results/{name}.json)):\n\n"
        f"{table(header, rows)}\n\n{growth(models)}"
    )


def first_part(result: Mapping[str, Any]) -> str:
    """Every try of every model, stage by stage."""
    stages = list(
        dict.fromkeys(stage for tries in result["models"].values() for each in tries for stage in each["stages"])
    )
    rows = [
        [
            f"{model}, {each['try']}", *(tenths(each["stages"].get(stage)) for stage in stages),
            f"**{tenths(each['compile'])}**", tenths(sum(each["stages"].values())), tenths(each["processor"]), tenths(each["load"]),
        ]
        for model, tries in result["models"].items()
        for each in tries
    ]  # fmt: skip
    columns = ("seconds", *stages, "compile and generate", "all", "processor, from compile on", "machine's load")
    return (
        f"Measured on {result['date']}, {result['machine']}, torch {result['torch']}, runtime {result['runtime']}"
        f" ([numbers](../benchmarks/results/first-result.json)):\n\n{table(columns, rows)}"
    )


def tenths(value: float | None) -> str:
    """Seconds with one digit; nothing where there are none."""
    return "" if value is None else f"{value:.1f}"


def growth(models: Mapping[str, Any]) -> str:
    """Which stages take longer per block in the largest model than in the smallest, if any do."""
    flux = sorted((each for each in models.values() if each["blocks"]), key=lambda each: each["blocks"])
    small, large = flux[0], flux[-1]
    times = large["blocks"] / small["blocks"]
    found = {
        stage: taken / small["stages"][stage]
        for stage, taken in large["stages"].items()
        if stage in small["stages"] and taken >= NOTICEABLE and taken > times * small["stages"][stage]
    }
    told = ", ".join(f"{stage} (× {ratio:.1f})" for stage, ratio in found.items()) or "nothing"
    return f"From {small['blocks']} to {large['blocks']} blocks (× {times:.1f}), these grow faster than the blocks: {told}."


def quality_part(result: Mapping[str, Any]) -> str:
    """Every policy and budget: what it gives and what it costs."""
    evaluated = TypeAdapter(EvaluationResult).validate_python(result)
    names = [name for name in METRICS if name in evaluated.lines[0].values]
    losses = [name for name in METRICS if name in evaluated.lines[0].losses]
    rows = [
        [
            "uncached",
            str(evaluated.num_steps),
            "",
            "",
            *(written(evaluated.uncached.get(name)) for name in names),
            *[""] * len(losses),
            "",
        ]
    ]
    rows += [
        [
            line.policy, str(line.budget), f"÷ {line.macs_reduction:.2f}", f"× {line.speedup:.2f}",
            *(written(line.values.get(name)) for name in names), *(percent(line.losses[name]) for name in losses), line.target,
        ]
        for line in evaluated.lines
    ]  # fmt: skip
    told = "\n".join(
        f"- {target_line(evaluated, policy)}" for policy in dict.fromkeys(line.policy for line in evaluated.lines)
    )
    columns = ("", "k", "MACs", "speed", *names, *(f"loss in {name}" for name in losses), "target")
    return (
        f"`{evaluated.command}`: {evaluated.samples} captions, {evaluated.batch_size} at a time, T ="
        f" {evaluated.num_steps}, {evaluated.forecaster} order {evaluated.order}. {evaluated.date},"
        f" {evaluated.machine}, torch {evaluated.versions['torch']}"
        f" ([numbers](../benchmarks/results/evaluate-shapes.json)). fid is the distance to {evaluated.reference}, in"
        f" features of the shipped classifier; {UNSURE}.\n\n{table(columns, rows)}\n\n{told}"
    )


def written(estimate: Estimate | None) -> str:
    """A value with its error, or nothing."""
    return "" if estimate is None else plain(estimate)


def bench_part(result: Mapping[str, Any]) -> str:
    """One model under everyone."""
    request = result["request"]
    config = request["config"]
    rows = [
        [
            line["name"], seconds(line["loop"]), f"{seconds(line['spread'][0])} to {seconds(line['spread'][1])}",
            f"× {line['speedup']:.2f}", milliseconds(line["recompute_step"]),
            "–" if line["cached_step"] is None else milliseconds(line["cached_step"]), f"{line['over_ideal']:.2f}",
            f"{line['prepare_seconds'] + line['first_loop']:.0f} s",
            f"{line['graphs']} / {line['graph_breaks']} / {line['recompiles']}", f"{line['held_bytes'] / 1e6:.0f} MB",
        ]
        for line in result["lines"]
    ]  # fmt: skip
    steps = ", ".join(map(str, result["recompute_steps"]))
    versions = ", ".join(
        f"{name} {result['versions'][name]}"
        for name in ("torch", "diffusers", "cache-dit")
        if name in result["versions"]
    )
    peer = (
        f"\n\nOurs is **{result['times_faster']:.2f} times** as fast as the fastest other cache"
        f" ({result['best_peer']})."
        if "times_faster" in result
        else ""
    )
    reasons: dict[str, list[str]] = {}
    for who, reason in result["failed"].items():
        reasons.setdefault(reason.removeprefix(f"{who}: "), []).append(who)
    failed = "".join(f"\n\nNot measured: {', '.join(who)}: {reason}." for reason, who in reasons.items())
    name = request["model"]
    columns = (
        "", "loop", "min to max", "speed", "recompute step", "cached step", "loop / ideal", "until the first result",
        "graphs / breaks / recompiles", "held",
    )  # fmt: skip
    return (
        f"### {name}\n\n`recache-compile bench {name} --rounds {result['rounds']}`: {MODELS[name]}; T ="
        f" {config['num_steps']}, k = {request['budget']} ({steps}), {config['dtype']}. {result['date']},"
        f" {result['machine']}, {versions}"
        f" ([numbers](../benchmarks/results/bench-{name}.json)).\n\n{table(columns, rows)}{peer}{failed}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def seconds(value: float) -> str:
    """Milliseconds where there are few."""
    return f"{value * 1e3:.0f} ms" if value < 0.5 else f"{value:.3f} s"


def milliseconds(value: float) -> str:
    """Two digits after the point."""
    return f"{value * 1e3:.2f} ms"


if __name__ == "__main__":
    write_page(HERE / "results", HERE.parent / "docs")
