"""``attention`` on ``npu_fused_infer_attention_score``, as a single operator and in torchair's graphs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from lowered_op import difference, kernel
from moe_families import FAMILIES, token_ids

from moe_fx.lowering.ascend import attention as lowering
from moe_fx.lowering.ops import CANONICAL_OPS

KERNEL = "torch_npu npu_fused_infer_attention_score"
HALF = [torch.float16, torch.bfloat16]


def operands(dtype=torch.bfloat16, *, heads=4, kv=2, queries=5, keys=9, width=16, v_width=16):
    shapes = ((2, heads, queries, width), (2, kv, keys, width), (2, kv, keys, v_width))
    return tuple(torch.randn(*shape).to(dtype) for shape in shapes)


ALLOWED = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_samples(dtype):
    for sample in CANONICAL_OPS["attention"].samples(dtype, torch.Generator().manual_seed(0)):
        case = ("attention", sample.args, dict(sample.kwargs))
        if kernel(*case) == KERNEL:
            assert difference(*case) == "", sample.name
        else:
            assert sample.name in ("additive", "mla"), (sample.name, kernel(*case))


CASES = {
    "causal, more keys than queries": ((), dict(is_causal=True)),
    "mask of both": ((ALLOWED,), dict(scale=0.3)),
    "mask of rank 2": ((ALLOWED[0, 0],), {}),
    "mask of the batch": ((ALLOWED[:, :, :1],), {}),
    "mask that leaves a query nothing": ((ALLOWED & (torch.arange(5) != 2)[:, None],), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    masks, attributes = CASES[name]
    case = ("attention", (*operands(), *masks), attributes)
    assert kernel(*case) == KERNEL
    assert difference(*case) == ""


def test_strided_operands():
    """Heads of one projection [B, S, H, D], transposed as models do."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands())
    assert difference("attention", (q, k, v), dict(is_causal=True)) == ""


REFUSED = {
    "fp32": (operands(torch.float32), {}, "float32"),
    "values of another width": (operands(v_width=32), {}, "one width"),
    "width": (operands(width=24, v_width=24), {}, "width 24"),
    "additive mask": ((*operands(), torch.zeros(5, 9, dtype=torch.bfloat16)), {}, "the mask is torch.bfloat16"),
    "mask by head": ((*operands(), ALLOWED.expand(2, 4, 5, 9)), {}, "from head to head"),
    "mask of rank 3": ((*operands(), ALLOWED[:1, 0]), {}, "rank 3"),
    "mask of queries alone": ((*operands(), ALLOWED[..., :1]), {}, "broadcast over keys"),
    "causal, one query": (operands(queries=1), dict(is_causal=True), "the first key only"),
    "groups": (operands(heads=128, kv=1), {}, "128 heads over 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    args, attributes, reason = REFUSED[name]
    text = kernel("attention", args, attributes)
    assert not text.startswith("torch_npu") and reason in text, text


MUTATIONS = dict(
    _CAUSAL=(3, "causal, more keys than queries"),
    _PRECISE_EMPTY_ROWS=(0, "mask that leaves a query nothing"),
)


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_attribute_is_noticed(name, monkeypatch):
    wrong, case = MUTATIONS[name]
    monkeypatch.setattr(lowering, name, wrong)
    masks, attributes = CASES[case]
    assert difference("attention", (*operands(), *masks), attributes) != ""


MODES = ("ge", "npugraph_ex")
BOUND = 1e-2


def compiled(function, mode, **options):
    torch._dynamo.reset()
    ge_interpreter.GRAPHS.clear()
    eager_kernels.EVENTS.clear()
    return compile_with_report(
        function, fullgraph=True, downstream="torchair", strict=True, cache=False, passes={"attention": True},
        downstream_options={"mode": mode}, **options,
    )  # fmt: skip


def ge_attributes():
    """Those that the lowering chooses, of the attention operators in the one GE graph."""
    names = ("num_heads", "num_key_value_heads", "sparse_mode", "inner_precise", "input_layout")
    (graph,) = ge_interpreter.GRAPHS.values()
    found = [ge_interpreter.Op(op) for op in graph.op if op.type == "FusedInferAttentionScore"]
    return [tuple(op.attr(name) for name in names) for op in found]


def repeat_kv(x, n):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)


# Keywords of scaled_dot_product_attention, number of queries, and what GE's operator is given.
IN_GRAPHS = {
    "causal": (dict(is_causal=True), 5, (4, 2, 2, 0, "BNSD")),
    "full": ({}, 5, (4, 2, 0, 0, "BNSD")),
    "masked": (dict(attn_mask=ALLOWED, scale=0.3), 5, (4, 2, 0, 2, "BNSD")),
    "one query": (dict(attn_mask=ALLOWED[:, :, :1]), 1, (4, 2, 0, 0, "BNSD")),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_in_torchairs_graphs(name, mode):
    keywords, queries, attributes = IN_GRAPHS[name]

    def function(q, k, v, attn_mask=None, **others):
        y = F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask, **others)
        return y.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    run = compiled(function, mode)
    on_npu = {key: value.npu() if isinstance(value, torch.Tensor) else value for key, value in keywords.items()}
    for _ in range(2):
        args = operands(queries=queries)
        got = run(*(x.npu() for x in args), **on_npu).cpu()
        assert relative_error(got, function(*args, **keywords)) <= BOUND
    (report,) = run.reports
    assert [site.kernel for site in report.matched] == [KERNEL]
    if mode == "ge":
        assert ge_interpreter.COUNTS["FusedInferAttentionScore"] == 2 and ge_attributes() == [attributes]
    else:
        assert 2 in eager_kernels.EVENTS, "nothing was replayed"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["causal", "full", "masked"])
@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
def test_one_graph_for_any_number_of_tokens(name, mode, token_major):
    """What the lowering writes; torch_npu's scaled_dot_product_attention itself keeps no size symbolic (see below)."""
    causal, scale = name == "causal", 0.25

    def function(q, k, v, mask=None):
        return lowering.attention(q, k, v, mask, is_causal=causal, scale=scale, single=False, token_major=token_major)

    run = compiled(function, mode, dynamic=None)
    # Never as many queries as heads: torchair compares the two where it simplifies transposes, and compiles anew.
    for batch, queries, keys in ((2, 5, 9), (3, 7, 12), (5, 8, 3)):
        shapes = ((batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16))
        args = [torch.randn(*shape).bfloat16() for shape in shapes]
        args += [torch.rand(batch, 1, queries, keys) > 0.4] if name == "masked" else []
        want = F.scaled_dot_product_attention(*args, is_causal=causal, scale=scale, enable_gqa=True)
        args = [x.npu() for x in args]
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 2)
        if name == "masked":
            torch._dynamo.mark_dynamic(args[3], 3)
        assert relative_error(run(*args).cpu(), want) <= BOUND
    assert len(run.reports) == 1, "a number of tokens was taken for a constant"
    if mode == "ge":
        layout = "BNSD_BSND" if token_major else "BNSD"
        assert ge_attributes() == [(4, 2, 2 if causal else 0, 2 if name == "masked" else 0, layout)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qwen3_moe", "afmoe"])
def test_models(name, mode, dynamic):
    model = FAMILIES[name].build(dtype=torch.bfloat16)
    shapes = ((2, 6), (3, 5)) if dynamic else ((2, 6), (2, 6))
    with torch.no_grad():
        wanted = [model(token_ids(*shape), use_cache=False).logits for shape in shapes]
    run = compiled(model.to("npu"), mode, dynamic=dynamic)
    for shape, want in zip(shapes, wanted, strict=True):
        assert relative_error(run(token_ids(*shape).npu(), use_cache=False).logits.cpu(), want) <= 6e-2
    for report in run.reports:
        assert [site.kernel for site in report.matched if site.kind == "attention"] == [KERNEL] * 2
    # torch_npu reads the sizes of scaled_dot_product_attention's operands while dynamo traces it.
    assert len(run.reports) == len(set(shapes))
    assert mode != "ge" or ge_interpreter.COUNTS["FusedInferAttentionScore"] == 4
