"""``experts``: gate/up projection, activation, down projection and weighted combine of the selected experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from moe_fx.lowering.ops.activation import activate, split_gate_up
from moe_fx.lowering.ops.spec import CanonicalOp, Sample, Tolerance, uniform_tolerance

LAYOUTS = ("gate_up", "up_gate", "interleaved", "split", "none")
WEIGHT_ON = ("output", "input")

SCHEMA = (
    "(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w2, Tensor? b13=None, Tensor? b2=None,"
    " Tensor? w3=None, Tensor? b3=None, *, str act='silu', str layout='gate_up', bool transposed=False,"
    " str weight_on='output', float alpha=1.702, float? limit=None, ScalarType? out_dtype=None) -> Tensor"
)


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    act: str = "silu",
    layout: str = "gate_up",
    transposed: bool = False,
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run each token through its selected experts and sum the weighted results.

    Args:
        x: [T, H] activations (bf16, fp16 or fp32).
        weights: [T, k] routing weights, in the dtype the model wrote; the product and the sum over k are taken in
            ``promote(x.dtype, weights.dtype)``.
        ids: [T, k] int32 or int64 expert of each pair; an id outside [0, E) contributes nothing.
        w13: [E, 2I, H] merged gate and up weights ([E, I, H] with layout ``split`` or ``none``);
            ``transposed``: [E, H, 2I].
        w2: [E, H, I] down weights; ``transposed``: [E, I, H].
        b13, b2: [E, 2I] and [E, H] biases.
        w3, b3: up weights [E, I, H] and bias [E, I], with layout ``split`` only (w13 then holds the gate).
        layout: how gate and up share w13's 2I rows: ``gate_up``, ``up_gate`` (halves), ``interleaved`` (gate even, up
            odd; gpt-oss), ``split`` (two weights), ``none`` (ungated).
        act, alpha, limit: see ``activation.activate``.
        weight_on: ``output`` weighs the expert's result, ``input`` its input before gate/up (Llama-4).
        out_dtype: dtype of the result; default ``x.dtype``.

    Returns:
        y [T, H].

    Each hit expert's weights are read once, for all its tokens: the arithmetic per expert is that of the eager loop in
    transformers' experts modules, the sum over k that of its ``grouped_mm`` form.
    """

    def project(e: int, rows: torch.Tensor) -> torch.Tensor:
        gate = _linear(rows, w13[e], None if b13 is None else b13[e], transposed)
        if w3 is None:
            gate, up = split_gate_up(gate, layout)
        else:
            up = _linear(rows, w3[e], None if b3 is None else b3[e], transposed)
        return _linear(activate(gate, up, act, alpha, limit), w2[e], None if b2 is None else b2[e], transposed)

    return run_experts(x, weights, ids, w13.shape[0], project, weight_on, out_dtype)


def run_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    n_experts: int,
    project: Callable[[int, torch.Tensor], torch.Tensor],
    weight_on: str = "output",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dispatch rows to ``project(expert, rows [n, H]) -> [n, H]``, one call per hit expert, and combine the results.

    See ``experts`` for the other arguments and the arithmetic of the combination.
    """
    num_tokens, top_k = ids.shape
    combine_dtype = torch.promote_types(x.dtype, weights.dtype)
    pair_expert, pair = torch.sort(ids.reshape(-1), stable=True)
    bounds = torch.searchsorted(
        pair_expert, torch.arange(n_experts + 1, dtype=pair_expert.dtype, device=ids.device)
    ).tolist()
    flat_weights = weights.reshape(-1)
    pair_out = x.new_zeros((num_tokens * top_k, x.shape[1]), dtype=combine_dtype)
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        rows = pair[begin:end]
        h = x[rows // top_k]
        weight = flat_weights[rows].unsqueeze(-1)
        if weight_on == "input":
            h = (h * weight).to(x.dtype)
        out = project(e, h)
        pair_out[rows] = out * weight if weight_on == "output" else out.to(combine_dtype)
    return pair_out.view(num_tokens, top_k, x.shape[1]).sum(dim=1).to(out_dtype or x.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    y = x @ (weight if transposed else weight.t())
    return y if bias is None else y + bias


def like_x(
    x: torch.Tensor, *args: torch.Tensor | None, out_dtype: torch.dtype | None = None, **kwargs: object
) -> torch.Tensor:
    """Shape and dtype of every experts op's result; refuses operands that do not belong together."""
    weights, ids = args[0], args[1]
    torch._check(x.dim() == 2, lambda: f"x must be [T, H], not {tuple(x.shape)}")
    assert weights is not None and ids is not None
    torch._check(weights.dim() == ids.dim() == 2, lambda: "weights and ids must be [T, k]")
    for axis in (0, 1):
        torch._check(weights.shape[axis] == ids.shape[axis], lambda: "weights and ids must have one shape")
    torch._check(ids.shape[0] == x.shape[0], lambda: "ids and x must count the same tokens")
    return torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=torch.contiguous_format)


def _samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * std).to(dtype)

    hidden, inter, n_experts, top_k = 64, 48, 8, 2
    cases: dict[str, dict[str, object]] = {
        "silu": {},
        "up_gate-gelu_tanh": dict(layout="up_gate", act="gelu_tanh"),
        "gpt_oss": dict(layout="interleaved", act="swiglu_oai", limit=7.0, transposed=True, biases=True),
        "split": dict(layout="split"),
        "relu2": dict(layout="none", act="relu2"),
        "clamped": dict(limit=1.0),
        "clamped_after": dict(act="silu_then_clamp", limit=0.5),
        "weighted_input": dict(weight_on="input"),
    }
    for name, case in cases.items():
        rows = inter if case.get("layout") in ("split", "none") else 2 * inter
        biases = case.pop("biases", False)
        up_shape, down_shape = (n_experts, rows, hidden), (n_experts, hidden, inter)
        if case.get("transposed"):
            up_shape, down_shape = (n_experts, hidden, rows), (n_experts, inter, hidden)
        for tokens in (1, 3, 40):
            weights = torch.rand(tokens, top_k, generator=rng)
            ids = torch.stack([torch.randperm(n_experts, generator=rng)[:top_k] for _ in range(tokens)])
            args = [
                normal(tokens, hidden), weights, ids.to(torch.int32),
                normal(*up_shape, std=hidden**-0.5), normal(*down_shape, std=inter**-0.5),
                normal(n_experts, rows) if biases else None, normal(n_experts, hidden) if biases else None,
                normal(*up_shape, std=hidden**-0.5) if case.get("layout") == "split" else None,
            ]  # fmt: skip
            yield Sample(f"{name}-T{tokens}", tuple(args), case)


def _fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    layout: str = "gate_up",
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    **attributes: object,
) -> torch.Tensor:
    """Shape and dtype of the result, after checking every operand against the op's docstring."""
    n_experts, hidden = w13.shape[0], x.shape[1]
    inter = w2.shape[1] if transposed else w2.shape[2]
    rows = inter if layout in ("split", "none") else 2 * inter

    def check(name: str, tensor: torch.Tensor | None, *expected: int) -> None:
        if tensor is not None:
            fits = tensor.dim() == len(expected) and all(a == b for a, b in zip(tensor.shape, expected, strict=True))
            torch._check(fits, lambda: f"{name} must be {list(expected)}, not {tuple(tensor.shape)}")
            torch._check(tensor.dtype == x.dtype, lambda: f"{name} is {tensor.dtype}, but x is {x.dtype}")

    up_shape = (n_experts, hidden, rows) if transposed else (n_experts, rows, hidden)
    check("w13", w13, *up_shape)
    check("w3", w3, *up_shape)
    check("w2", w2, *((n_experts, inter, hidden) if transposed else (n_experts, hidden, inter)))
    check("b13", b13, n_experts, rows)
    check("b3", b3, n_experts, rows)
    check("b2", b2, n_experts, hidden)
    return like_x(x, weights, ids, out_dtype=out_dtype)


EXPERTS = CanonicalOp(
    name="experts",
    schema=SCHEMA,
    reference=experts,
    # Two chained matrix products whose intermediate is rounded to the model's dtype: a few units of that dtype's
    # rounding (2^-8 for bf16, 2^-11 for fp16) relative to the result's norm.
    tolerance=uniform_tolerance(
        fp32=Tolerance(1e-4, 1e-4, 1e-5), half=Tolerance(2e-2, 1e-2, 4e-3), bf16=Tolerance(1e-1, 5e-2, 2e-2)
    ),
    samples=_samples,
    fake=_fake,
).register()
