"""``attention`` on ``npu_fused_infer_attention_score``, as a single operator and in torchair's graphs.

And ``scaled_dot_product_attention`` as models call it by default, with no pass switched on: converted in GE graphs, of
any size in dynamic ones, torch_npu's own operator elsewhere.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import torch
import torch.nn.functional as F
from compiling import compile_with_report, relative_error
from host_cann import eager_kernels, ge_interpreter
from lowered_op import difference, kernel
from model_cases import inputs
from moe_families import FAMILIES
from npu_report import note, on_hardware

from moe_fx.lowering.ascend import attention as lowering
from moe_fx.lowering.ops import CANONICAL_OPS

KERNEL = "torch_npu npu_fused_infer_attention_score"
HALF = [torch.float16, torch.bfloat16]


def operands(dtype=torch.bfloat16, *, heads=4, kv=2, queries=5, keys=9, width=16, v_width=16):
    shapes = ((2, heads, queries, width), (2, kv, keys, width), (2, kv, keys, v_width))
    return tuple(torch.randn(*shape).to(dtype) for shape in shapes)


ALLOWED = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.npu
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


@pytest.mark.npu
@pytest.mark.parametrize("name", CASES)
def test_case(name):
    masks, attributes = CASES[name]
    case = ("attention", (*operands(), *masks), attributes)
    assert kernel(*case) == KERNEL
    assert difference(*case) == ""


@pytest.mark.npu
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


def compiled(function, mode, *, matched=True, **options):
    torch._dynamo.reset()
    ge_interpreter.GRAPHS.clear()
    eager_kernels.EVENTS.clear()
    return compile_with_report(
        function, fullgraph=True, downstream="torchair", strict=True, cache=False, passes={"attention": matched},
        downstream_options={"mode": mode}, **options,
    )  # fmt: skip


def check_what_ran(mode, operator=None, calls=0):
    """A replay in one mode, and in the other so many calls of GE's operator; only the stand-in can tell."""
    if on_hardware():
        return
    if mode == "npugraph_ex":
        assert 2 in eager_kernels.EVENTS, "nothing was replayed"
    elif operator is not None:
        assert ge_interpreter.COUNTS[operator] == calls


def ge_attributes():
    """Those that the lowering chooses, of the attention operators in the one GE graph."""
    names = ("num_heads", "num_key_value_heads", "sparse_mode", "inner_precise", "input_layout")
    (graph,) = ge_interpreter.GRAPHS.values()
    found = [ge_interpreter.Op(op) for op in graph.op if op.type == "FusedInferAttentionScore"]
    return [tuple(op.attr(name) for name in names) for op in found]


def repeat_kv(x, n):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)


NOT_THE_FIRST = torch.tensor([False, True]).view(2, 1, 1, 1)  # Of the batch.
# Keywords of scaled_dot_product_attention, number of queries, and what GE's operator is given.
IN_GRAPHS = {
    "causal": (dict(is_causal=True), 5, (4, 2, 2, 0, "BNSD")),
    "full": ({}, 5, (4, 2, 0, 0, "BNSD")),
    "masked": (dict(attn_mask=ALLOWED, scale=0.3), 5, (4, 2, 0, 2, "BNSD")),
    "mask of all queries": (dict(attn_mask=ALLOWED[:, :, :1].clone()), 5, (4, 2, 0, 2, "BNSD")),
    "one query": (dict(attn_mask=ALLOWED[:, :, :1]), 1, (4, 2, 0, 0, "BNSD")),
    "one query, of none of the keys": (dict(attn_mask=ALLOWED[:, :, :1] & NOT_THE_FIRST), 1, (4, 2, 0, 0, "BNSD")),
}


@pytest.mark.npu
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
        assert note(relative_error(got, function(*args, **keywords))) <= BOUND
    (report,) = run.reports
    assert [site.kernel for site in report.matched] == [KERNEL]
    check_what_ran(mode, "FusedInferAttentionScore", calls=2)
    assert on_hardware() or mode != "ge" or ge_attributes() == [attributes]


@pytest.mark.npu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["causal", "full", "masked"])
@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
def test_one_graph_for_any_number_of_tokens(name, mode, token_major):
    """What the lowering writes, for an engine that calls it."""
    causal, scale = name == "causal", 0.25

    def function(q, k, v, mask=None):
        return lowering.attention(q, k, v, mask, is_causal=causal, scale=scale, single=False, token_major=token_major)

    run = compiled(function, mode, dynamic=None)
    # Never as many queries as heads: torchair compares the two where it simplifies transposes, and compiles anew.
    for batch, queries, keys in ((2, 5, 9), (3, 7, 12), (5, 8, 3)):
        args = [torch.randn(batch, heads, n, 16).bfloat16() for heads, n in ((4, queries), (2, keys), (2, keys))]
        args += [torch.rand(batch, 1, queries, keys) > 0.4] if name == "masked" else []
        want = F.scaled_dot_product_attention(*args, is_causal=causal, scale=scale, enable_gqa=True)
        args = [x.npu() for x in args]
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 2)
        if name == "masked":
            torch._dynamo.mark_dynamic(args[3], 3)
        assert note(relative_error(run(*args).cpu(), want)) <= BOUND
    assert len(run.reports) == 1, "a number of tokens was taken for a constant"
    if mode == "ge" and not on_hardware():
        layout = "BNSD_BSND" if token_major else "BNSD"
        assert ge_attributes() == [(4, 2, 2 if causal else 0, 2 if name == "masked" else 0, layout)]


GROUPED, ONE_HEAD = tuple(x[0] for x in operands()), operands(kv=1)[2][0]
# Keywords of scaled_dot_product_attention and operands that npu_fused_infer_attention_score refuses.
WRITTEN_OUT = {
    "fp32": (dict(is_causal=True), operands(torch.float32, kv=4)),
    "fp32, groups of heads": (dict(attn_mask=ALLOWED, enable_gqa=True), operands(torch.float32)),
    "a query without keys": (
        dict(attn_mask=CASES["mask that leaves a query nothing"][0][0]),
        operands(torch.float32, kv=4),
    ),
    "values of another width": (dict(is_causal=True, scale=0.2), operands(kv=4, width=24, v_width=16)),
    "additive mask": (dict(attn_mask=torch.randn(2, 1, 5, 9).bfloat16()), operands(kv=4)),
    "mask by head": (dict(attn_mask=ALLOWED.expand(2, 4, 5, 9).clone()), operands(kv=4)),
    "rank 3": (dict(attn_mask=ALLOWED[:, 0]), tuple(x[:, 0] for x in operands())),
    "rank 3, values in groups of their own": (dict(enable_gqa=True), (*GROUPED[:2], ONE_HEAD)),
}


@pytest.mark.npu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_pytorchs_function(name, mode, dynamic):
    """As models call it, with no pass switched on: written out in GE graphs and in dynamic ones."""
    keywords, args = WRITTEN_OUT[name]

    def function(q, k, v, attn_mask):
        return F.scaled_dot_product_attention(q, k, v, **{**keywords, "attn_mask": attn_mask})

    run = compiled(function, mode, matched=False, dynamic=dynamic)
    mask = keywords.get("attn_mask")
    want = function(*args, mask)
    for _ in range(2):
        got = run(*(x.npu() for x in args), None if mask is None else mask.npu()).cpu()
        assert torch.isfinite(got).all() and note(relative_error(got, want)) <= BOUND
    assert len(run.reports) == 1
    check_what_ran(mode)


@pytest.mark.npu
@pytest.mark.parametrize("matched", [False, True], ids=["by default", "with the pass"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_models(name, mode, dynamic, matched):
    """With sdpa; DeepSeek's keys are wider than its values, which the operator refuses."""
    model = FAMILIES[name].build(dtype=torch.bfloat16)
    shapes = ((2, 6), (3, 5), (2, 6)) if dynamic else ((2, 6), (2, 6))
    with torch.no_grad():
        wanted = [model(inputs(*shape), use_cache=False).logits for shape in shapes]
    run = compiled(model.to("npu"), mode, matched=matched, dynamic=dynamic)
    for shape, want in zip(shapes, wanted, strict=True):
        got = run(inputs(*shape).npu(), use_cache=False).logits.cpu()
        assert note(relative_error(got, want)) <= 6e-2
    (report,) = run.reports
    takes_it = name != "deepseek_v3"
    kernels = [site.kernel for site in report.matched if site.kind == "attention"]
    assert len(kernels) == (2 if matched else 0) and all((kernel == KERNEL) == takes_it for kernel in kernels)
    check_what_ran(mode, "FusedInferAttentionScore", calls=2 * len(shapes) if takes_it else 0)


@pytest.mark.parametrize("downstream", ["eager", "aot_eager"])
def test_it_is_not_written_out_for_other_compilers(downstream):
    """They run torch_npu's operator, which has no scores of all keys for all queries in memory."""
    run = compile_with_report(
        F.scaled_dot_product_attention, dynamic=True, downstream=downstream, cache=False, passes={"attention": True}
    )
    args = operands(torch.float32, kv=4)
    got = run(*(x.npu() for x in args)).cpu()
    assert note(relative_error(got, F.scaled_dot_product_attention(*args))) <= BOUND
    ((site,),) = [report.matched for report in run.reports]
    assert "written out" not in site.kernel and "float32" in site.kernel


def sizes():
    """q, k and v for two numbers of tokens."""
    for tokens in (5, 7):
        yield tuple(x.npu() for x in operands(kv=4, queries=tokens, keys=tokens))


def test_other_backends_see_torch_npu_alone():
    """It fixes sizes, which is why there is a hook; and the hook answers only while moe_ascend traces."""
    graphs = []

    def backend(gm, examples):
        graphs.append(gm)
        return gm.forward

    others = torch.compile(F.scaled_dot_product_attention, backend=backend, dynamic=True)
    with torch.no_grad():
        for args in sizes():
            others(*args)
    assert len(graphs) == 2
    run = compiled(F.scaled_dot_product_attention, "ge", matched=False, dynamic=True)
    for args in sizes():
        run(*args)
    assert len(run.reports) == 1
