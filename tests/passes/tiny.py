"""Models of a few operations, and how these tests capture, split, run and print them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from recache_compile.capture.capture import Captured, capture
from recache_compile.ir.meta import is_described, value_of
from recache_compile.ir.program import Granularity, Program, SitePattern, pattern_name
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.base import run_passes
from recache_compile.passes.find_cache_sites import find_cache_sites
from recache_compile.passes.hoist import Hoist
from recache_compile.passes.insert_cache_points import InsertCachePoints
from recache_compile.passes.prologue import build_prologue
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise

aten = torch.ops.aten

WIDTH = 4
TOKENS = 3

Forward = Callable[["Formula", Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]


class Formula(nn.Module):
    """A `forward` given as a function of (self, latents, timestep, conditioning), with some weights to use."""

    def __init__(self, forward: Forward, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.function = forward
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.randn(8, WIDTH))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> object:
        return self.function(self, hidden_states, timestep, encoder_hidden_states)

    def embed(self, timestep: Tensor) -> Tensor:
        """A timestep embedding (batch, WIDTH)."""
        return self.time(timestep.sin()[:, None])


class Block(nn.Module):
    """hidden + W(hidden * scale)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return hidden + self.linear(hidden * scale)


class Plain(nn.Module):
    """Blocks on the latents and a projection; the timestep scales, the conditioning is added first."""

    def __init__(self, num_blocks: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        scale = timestep.sin()
        for block in self.blocks:
            hidden_states = block(hidden_states, scale)
        return self.out(hidden_states)


class AttentionBlock(nn.Module):
    """Modulated cross attention: W_m reads the timestep, W_k and W_v the conditioning, W_q and W_o the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, hidden: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        scale, gate = self.modulation(nn.functional.silu(embedding))[:, None].chunk(2, -1)
        query = self.query(hidden * (1 + scale))
        attended = nn.functional.scaled_dot_product_attention(query, self.key(context), self.value(context))
        return hidden + gate * self.out(attended)


class Attention(nn.Module):
    """The shape of a diffusion transformer: embedding of the timestep, blocks, modulated projection."""

    def __init__(self, num_blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(num_blocks))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        embedding = self.time(timestep[:, None])
        for block in self.blocks:
            hidden_states = block(hidden_states, embedding, encoder_hidden_states)
        return self.out(hidden_states + embedding[:, None])


class Heads(nn.Module):
    """Parallel blocks, each read by the head: one `stack` site for each block."""

    def __init__(self, num_blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        features = [block(hidden_states, timestep) for block in self.blocks]
        return torch.cat(features, -1)


def example(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of one call of a module of this file."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "hidden_states": torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype),
        "timestep": torch.full((1,), 0.7, dtype=dtype),
    }
    if not isinstance(module, (Plain, Heads)):
        values["encoder_hidden_states"] = torch.randn(1, 2, WIDTH, generator=generator).to(dtype)
    return values


def captured(module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> tuple[Program, Captured]:
    """The module as a program, with nothing done to it, and what is known of it."""
    made = capture(module, inputs or example(module))
    return made.program, made


def simple(module: nn.Module) -> Program:
    """The module as a program without what it does not use."""
    return Simplify()(captured(module)[0]).program


def annotated(
    module: nn.Module,
    granularity: Granularity = Granularity.STACK,
    inputs: Mapping[str, Tensor] | None = None,
    residual: bool | None = None,
) -> Program:
    """The module as a program with cache points."""
    program, made = captured(module, inputs)
    sites = find_cache_sites(program.module.graph, granularity, made.containers, residual)
    return run_passes(program, (InsertCachePoints(sites), Simplify()))


@dataclass(frozen=True, slots=True)
class Split:
    """A program, its prologue and its hoisted step programs by the table they read."""

    annotated: Program
    prologue: Program
    steps: dict[str, Program]


def split(
    module: nn.Module,
    patterns: Sequence[SitePattern] = ((0,),),
    granularity: Granularity = Granularity.STACK,
    inputs: Mapping[str, Tensor] | None = None,
) -> Split:
    """Cut a module in two; `patterns` must read different tables."""
    whole = annotated(module, granularity, inputs)
    steps = {
        pattern_name(pattern): run_passes(whole, (Specialise(pattern), Hoist(), Simplify())).renamed(
            pattern_name(pattern)
        )
        for pattern in patterns
    }
    return Split(whole, build_prologue(whole, steps), steps)


def call(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a program: values by name in, values by name out."""
    results = program.module(*(values[value.name] for value in program.inputs))
    return dict(zip((value.name for value in program.outputs), results, strict=True))


def fill_tables(prologue: Program, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a prologue with the same timesteps (rows, *shape) for every table."""
    rows = {value.name: timesteps for value in prologue.inputs if value.kind is Kind.TIMESTEP}
    return call(prologue, {**inputs, **rows})


def read_tables(program: Program, table: str, tables: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The packed inputs of one step."""
    return {
        value.name: tables[f"{table}.{value.name}"][row if value.kind is Kind.TABLE_ROW else slice(None)]
        for value in program.inputs
        if value.kind in (Kind.TABLE_ROW, Kind.FIXED)
    }


def show(program: Program) -> str:
    """A graph as text, one node a line, the same for every version of torch."""
    return "\n".join(_line(node) for node in program.module.graph.nodes)


def show_graph(graph: fx.Graph) -> str:
    """The same for a bare graph."""
    return "\n".join(_line(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        if not is_described(node):
            return f"{node.name}: input"
        return f"{node.name}: {value_of(node).kind} {_shape(value_of(node))}"
    if node.op == "output":
        return f"return {node.args[0]}"
    if node.op == "get_attr":
        return f"{node.name}: weight {node.target}"
    kwargs = "".join(f", {key}={value}" for key, value in node.kwargs.items())
    return f"{node.name} = {node.target}({', '.join(map(str, node.args))}{kwargs})"


def _shape(value: Value) -> str:
    return "x".join("rows" if size is None else str(size) for size in value.shape) or "scalar"
