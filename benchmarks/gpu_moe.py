"""One MoE block of Qwen3-30B-A3B on a GPU: our kernels beside Inductor, eager, and the time to read the weights.

    python benchmarks/gpu_moe.py
    python benchmarks/gpu_moe.py --batches 1 8 128 --tables experts block

Every number is the median of CUDA-graph replays with the level-2 cache flushed before each. The floor is the time to
move the bytes of the distinct experts that a batch hits (or, in the table of small kernels, the kernel's operands and
results, plus the time of one empty launch) at the copy bandwidth measured in the same run.

The block's peers are transformers' own block with grouped_mm and batched_mm experts, under Inductor with a CUDA graph,
and eager grouped_mm captured in a graph. batched_mm gathers the weights of every token's experts, so it ends at
--batched-to tokens.

The table of limits says how near the floor a kernel of Triton can come: it reads the bytes of the same experts and does
nothing with them, in one launch, and in two of which the second waits for the first, as down waits for gate and up.
Beside the small kernels stands a launch that copies as many bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import nn

from moe_fx.lowering.cuda import gating, norms, qk_norm_rope, swiglu, timing
from moe_fx.lowering.cuda.device import dependent_launch
from moe_fx.lowering.cuda.experts import experts
from moe_fx.lowering.cuda.experts_int4 import experts_int4
from moe_fx.lowering.ops import CANONICAL_OPS
from moe_fx.lowering.triton.dependent_launch import allow_dependents, wait_for_inputs

HIDDEN, INTER, EXPERTS, TOP_K, GROUP = 2048, 768, 128, 8, 128
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
DENSE_INTER = 6144  # of the dense layers that the model's family has
BATCHES = (1, 2, 4, 8, 16, 32, 128, 1024)
SMALL_BATCHES = (1, 16, 128, 1024, 4096)
TABLES = ("limits", "experts", "block", "small", "norms")
BF16 = torch.bfloat16


@triton.jit
def empty_kernel():
    """What a launch alone costs."""
    pass


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    """What a launch costs that waits for cold memory once, and moves ``size`` words there and back."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + word, tl.load(source + word, mask=word < size), mask=word < size)


@triton.jit
def read_experts_kernel(
    weights,
    ids,
    before,
    out,
    EXPERT: tl.constexpr,
    FIRST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Reads a part of the experts in ``ids``: PROGRAMS times SIZE words of each one's EXPERT words, from word FIRST on.

    With ``before``, what an earlier launch leaves there is waited for after the reads, and read. A sum goes to ``out``.
    """
    wait_for_inputs(PDL and before is None)
    allow_dependents(PDL)
    program = tl.program_id(0)
    expert = tl.load(ids + program // PROGRAMS)
    words = weights + expert.to(tl.int64) * EXPERT + FIRST + (program % PROGRAMS) * SIZE
    total = tl.zeros([BLOCK], tl.int32)
    for start in tl.static_range(0, SIZE, BLOCK):
        total += tl.load(words + start + tl.arange(0, BLOCK))
    if before is not None:
        wait_for_inputs(PDL)
        total += tl.load(before + tl.arange(0, BLOCK))
    tl.store(out + program, tl.sum(total))


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured at how many tokens, in microseconds; None where it was left out."""

    tokens: int
    microseconds: dict[str, float | None]


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available():
        print("benchmarks/gpu_moe.py needs a CUDA device, and none is available here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bandwidth = timing.copy_bandwidth()
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "limits": lambda: _limits(arguments.batches, bandwidth),
        "experts": lambda: _experts(arguments.batches, bandwidth),
        "block": lambda: _blocks(arguments.batches, arguments.batched_to, bandwidth),
        "small": lambda: _small_kernels(arguments.small_batches, bandwidth),
        "norms": lambda: _norms(arguments.small_batches, bandwidth),
    }
    tables = {name: list(makers[name]()) for name in arguments.tables}
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bandwidth_gb_s": bandwidth / 1e9,
    }
    if arguments.json:
        print(json.dumps({**about, "tables": {k: [vars(row) for row in rows] for k, rows in tables.items()}}, indent=1))
        return 0
    console = Console(width=max(120, Console().width))
    console.print(", ".join(f"{k}: {v:.1f}" if isinstance(v, float) else f"{k}: {v}" for k, v in about.items()))
    for name, rows in tables.items():
        console.print(_table(name, rows))
    return 0


def _limits(batches: list[int], bandwidth: float) -> Iterator[Row]:
    """Reading the experts that a batch hits, and no more."""
    gate_up, down = 2 * INTER * HIDDEN // 2, INTER * HIDDEN // 2  # 32-bit words of an expert in bf16
    weights = torch.zeros(EXPERTS, gate_up + down, dtype=torch.int32, device="cuda")
    sums, totals = (torch.zeros(1 << 20, dtype=torch.int32, device="cuda") for _ in range(2))
    dependent = dependent_launch(weights.device)

    def read(first: int, words: int, size: int, before: torch.Tensor | None, warps: int, **pdl: bool) -> None:
        programs = words // size
        read_experts_kernel[(programs * hit.numel(),)](
            weights, hit, before, sums if before is None else totals, EXPERT=gate_up + down, FIRST=first,
            PROGRAMS=programs, SIZE=size, BLOCK=1024, num_warps=warps, **pdl,
        )  # fmt: skip

    def read_twice() -> None:
        read(0, gate_up, 2048, None, 2, **dependent)
        read(gate_up, down, 6144, sums, 8, **dependent)

    for tokens in batches:
        _, _, ids = _routed(tokens)
        hit = ids.unique()
        yield Row(
            tokens,
            {
                "floor": hit.numel() * weights[0].nbytes / bandwidth * 1e6,
                "one launch": timing.graph_microseconds(partial(read, 0, gate_up + down, 2048, None, 4, PDL=False)),
                "two launches": timing.graph_microseconds(read_twice),
            },
        )


def _experts(batches: list[int], bandwidth: float) -> Iterator[Row]:
    """The expert kernels alone, bf16 and W4A16."""
    w13, w2 = _weight(EXPERTS, 2 * INTER, HIDDEN), _weight(EXPERTS, HIDDEN, INTER)
    w13_int4, w2_int4 = _int4_weight(EXPERTS, 2 * INTER, HIDDEN), _int4_weight(EXPERTS, HIDDEN, INTER)
    dense_bytes = w13[0].nbytes + w2[0].nbytes
    int4_bytes = sum(part[0].nbytes for part in (*w13_int4, *w2_int4))
    for tokens in batches:
        x, weights, ids = _routed(tokens)
        hit = int(ids.unique().numel())
        dense = timing.graph_microseconds(partial(experts, x, weights, ids, w13, w2))
        int4 = timing.graph_microseconds(partial(experts_int4, x, weights, ids, *w13_int4, *w2_int4))
        yield Row(
            tokens,
            {
                "bf16 floor": hit * dense_bytes / bandwidth * 1e6,
                "bf16": dense,
                "W4A16 floor": hit * int4_bytes / bandwidth * 1e6,
                "W4A16": int4,
            },
        )


def _blocks(batches: list[int], batched_to: int, bandwidth: float) -> Iterator[Row]:
    """The whole block, router included."""
    models = {name: _transformers_block(name) for name in ("grouped_mm", "batched_mm")}
    models["batched_mm"].load_state_dict(models["grouped_mm"].state_dict())  # The same experts are hit.
    expert_bytes = 3 * INTER * HIDDEN * 2
    for tokens in batches:
        x = torch.randn(1, tokens, HIDDEN, dtype=BF16, device="cuda")
        block = models["grouped_mm"]
        with torch.no_grad():
            _, _, ids = _router_output(block, x)
            hit = int(ids.unique().numel())
            times: dict[str, float | None] = {"floor": hit * expert_bytes / bandwidth * 1e6}
            times["moe_ascend"] = _compiled_time(block, x, "moe_ascend")
            times["inductor grouped_mm"] = _compiled_time(block, x, "inductor")
            few = tokens <= batched_to
            times["inductor batched_mm"] = _compiled_time(models["batched_mm"], x, "inductor") if few else None
            times["eager grouped_mm"] = timing.graph_microseconds(partial(block, x))
        yield Row(tokens, times)


def _compiled_time(block: nn.Module, x: torch.Tensor, backend: str) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, dynamic=False)
    return timing.graph_microseconds(partial(compiled, x))


def _router_output(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(logits, weights, ids) of transformers' router module."""
    result: tuple[torch.Tensor, ...] = block.gate(x.reshape(-1, HIDDEN))
    return result


def _launch_time() -> float:
    """Microseconds of an empty launch: measured anew for every line, since it drifts by one within minutes."""
    return timing.graph_microseconds(lambda: empty_kernel[(1,)]())


def _small_kernels(batches: list[int], bandwidth: float) -> Iterator[Row]:
    """Gating and qk-norm-rope."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    q_weight, k_weight = (torch.ones(HEAD_DIM, dtype=BF16, device="cuda") for _ in range(2))
    for tokens in batches:
        logits = torch.randn(tokens, EXPERTS, dtype=BF16, device="cuda")
        qkv = torch.randn(1, tokens, width, dtype=BF16, device="cuda")
        q, k, _ = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        q, k = q.unflatten(-1, (HEADS, HEAD_DIM)), k.unflatten(-1, (KV_HEADS, HEAD_DIM))
        angle = torch.rand(1, tokens, HEAD_DIM, device="cuda")
        cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
        route_bytes = logits.nbytes + tokens * TOP_K * (4 + 2)
        rope_bytes = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        launch = _launch_time()
        yield Row(
            tokens,
            {
                "empty launch": launch,
                "gating floor": route_bytes / bandwidth * 1e6 + launch,
                "gating, its bytes copied": _copy_time(route_bytes),
                "gating": timing.graph_microseconds(
                    partial(gating.route, logits, top_k=TOP_K, renormalize="eps", out_dtype=BF16)
                ),
                "qk-norm-rope floor": rope_bytes / bandwidth * 1e6 + launch,
                "qk-norm-rope, its bytes copied": _copy_time(rope_bytes),
                "qk-norm-rope": timing.graph_microseconds(
                    partial(qk_norm_rope.qk_norm_rope, q, k, q_weight, k_weight, cos, sin, 1e-6)
                ),
            },
        )


def _copy_time(moved: int) -> float:
    """Microseconds of a launch that moves so many bytes, half of them read and half written."""
    words, block = moved // 8, 1024
    source, target = (torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(2))
    programs = (triton.cdiv(words, block),)
    return timing.graph_microseconds(lambda: copy_kernel[programs](source, target, words, BLOCK=block))


def _norms(batches: list[int], bandwidth: float) -> Iterator[Row]:
    """Norms and SwiGLU beside what Inductor makes of the canonical references."""
    weight = torch.ones(HIDDEN, dtype=BF16, device="cuda")
    for tokens in batches:
        x, residual = (torch.randn(tokens, HIDDEN, dtype=BF16, device="cuda") for _ in range(2))
        merged = torch.randn(tokens, 2 * DENSE_INTER, dtype=BF16, device="cuda")
        cases: dict[str, tuple[Callable[..., object], int, tuple[object, ...]]] = {
            "rms_norm": (norms.rms_norm, 2 * x.nbytes, (x, weight, 1e-6)),
            "add_rms_norm": (norms.add_rms_norm, 4 * x.nbytes, (x, residual, weight, 1e-6)),
            "swiglu": (swiglu.swiglu, merged.nbytes * 3 // 2, (merged,)),
        }
        launch = _launch_time()
        times: dict[str, float | None] = {"empty launch": launch}
        for name, (launcher, moved, operands) in cases.items():
            torch._dynamo.reset()
            inductor = torch.compile(CANONICAL_OPS[name].reference, dynamic=False)
            times[f"{name} floor"] = moved / bandwidth * 1e6 + launch
            times[name] = timing.graph_microseconds(partial(launcher, *operands))
            times[f"Inductor's {name}"] = timing.graph_microseconds(partial(inductor, *operands))
        yield Row(tokens, times)


def _transformers_block(experts_implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTER, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, num_hidden_layers=1,
    )  # fmt: skip
    config._experts_implementation = experts_implementation
    with torch.device("cuda"):
        block = Qwen3MoeSparseMoeBlock(config).to(BF16).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return block.requires_grad_(False)


def _routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, routing weights and ids of a uniformly random router: the same in every table and run."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, dtype=BF16, device="cuda", generator=generator)
    logits = torch.randn(tokens, EXPERTS, device="cuda", generator=generator)
    weights, ids = gating.route(logits, top_k=TOP_K, out_dtype=BF16)
    return x, weights, ids


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=BF16, device="cuda") * shape[-1] ** -0.5


def _int4_weight(n_experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    nibbles = torch.randint(0, 256, (n_experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
    return nibbles, torch.rand(n_experts, rows, columns // GROUP, device="cuda").to(BF16) * columns**-0.5


def _table(name: str, rows: list[Row]) -> Table:
    """Microseconds; measured columns that have a floor show how many times it they took."""
    columns = list(rows[0].microseconds)
    table = Table(title=f"{name}: microseconds (times its floor)")
    for column in ("tokens", *columns):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for column in columns:
            value = row.microseconds[column]
            measured = column.partition(",")[0]
            floor = row.microseconds.get(f"{measured} floor", row.microseconds.get("floor"))
            of_floor = f" ({value / floor:.2f})" if value and floor and "floor" not in column else ""
            cells.append("–" if value is None else f"{value:.1f}{of_floor}")
        table.add_row(str(row.tokens), *cells)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N")
    parser.add_argument("--small-batches", type=int, nargs="+", default=list(SMALL_BATCHES), metavar="N")
    parser.add_argument("--batched-to", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
