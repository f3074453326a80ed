"""Goldens: what each pass makes of a small graph. EXPECTTEST_ACCEPT=1 pytest tests/golden regenerates."""

from __future__ import annotations

import expecttest
import torch
import torch.nn.functional as F
from compiling import compile_with_report
from moe_blocks import FORMS, Block, H
from torch import nn

from moe_fx.graph_text import graph_text


def rewritten(fn, *inputs: torch.Tensor, **options) -> str:
    """The graph after all passes, without its inputs."""
    torch._dynamo.reset()
    switches = dict(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with torch._dynamo.config.patch(**switches):
        compiled = compile_with_report(fn, **options)
        compiled(*inputs)
    lines = graph_text(compiled.reports[0].graph.graph).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%arg")) + "\n"


def block(form: str) -> str:
    torch.manual_seed(0)
    return rewritten(Block(FORMS[form][0]), torch.randn(6, H))


class GoldenPasses(expecttest.TestCase):
    maxDiff = None

    def test_drop_noops(self):
        def fn(x):
            y = x.view(x.shape)[:, 0:].to(x.dtype) * 1.0
            return F.dropout(y.unsqueeze(1).squeeze(1), 0.5, training=False).exp()

        self.assertExpectedInline(
            rewritten(fn, torch.randn(4, 8)),
            """\
%exp: f32[4, 8] = aten.exp(%arg)
return (%exp)
""",
        )

    def test_router_deepseek_v3(self):
        gate, bias = torch.randn(8, H), torch.randn(8)

        def fn(x):
            scores = F.linear(x, gate).sigmoid()
            choice = scores + bias
            best = choice.view(-1, 4, 2).topk(2, -1)[0].sum(-1)
            mask = torch.zeros_like(best).scatter_(1, best.topk(2, sorted=False)[1], 1)
            mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
            ids = choice.masked_fill(~mask.bool(), float("-inf")).topk(2, sorted=False)[1]
            w = scores.gather(1, ids)
            return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids

        self.assertExpectedInline(
            rewritten(fn, torch.randn(6, H)),
            """\
%linear: f32[6, 8] = aten.linear(%arg, %arg_1)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%linear, %arg_2, score='sigmoid', n_group=4, topk_group=2, group_score='top2sum', top_k=2, sorted=False, renormalize='eps', eps=1e-20, scale=2.5)
%getitem: i32[6, 2] = getitem(%route, 1)
%to_copy: i64[6, 2] = aten._to_copy(%getitem, dtype=i64)
%getitem_1: f32[6, 2] = getitem(%route, 0)
return (%getitem_1, %to_copy)
""",
        )

    def test_experts_grouped(self):
        self.assertExpectedInline(
            block("grouped"),
            """\
%to_copy: bf16[6, 16] = aten._to_copy(%arg_1, dtype=bf16)
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%to_copy_1: bf16[8, 48, 16] = aten._to_copy(%arg_2, dtype=bf16)
%to_copy_2: bf16[8, 16, 24] = aten._to_copy(%arg_3, dtype=bf16)
%experts: f32[6, 16] = moe_fx.experts(%to_copy, %getitem_1, %getitem, %to_copy_1, %to_copy_2, out_dtype=f32)
return (%experts)
""",
        )

    def test_experts_titan(self):
        self.assertExpectedInline(
            block("titan"),
            """\
%to_copy: bf16[6, 16] = aten._to_copy(%arg_1, dtype=bf16)
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%to_copy_1: bf16[8, 24, 16] = aten._to_copy(%arg_2, dtype=bf16)
%to_copy_2: bf16[8, 24, 16] = aten._to_copy(%arg_3, dtype=bf16)
%to_copy_3: bf16[8, 16, 24] = aten._to_copy(%arg_4, dtype=bf16)
%experts: f32[6, 16] = moe_fx.experts(%to_copy, %getitem_1, %getitem, %to_copy_1, %to_copy_3, None, None, %to_copy_2, layout='split', out_dtype=f32)
return (%experts)
""",
        )

    def test_experts_batched(self):
        self.assertExpectedInline(
            block("batched"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_3)
return (%experts)
""",
        )

    def test_experts_biased_interleaved(self):
        self.assertExpectedInline(
            block("biased_interleaved"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_4, %arg_3, %arg_5, act='swiglu_oai', layout='interleaved', limit=0.5, transposed=True)
return (%experts)
""",
        )

    def test_experts_relu_squared(self):
        self.assertExpectedInline(
            block("relu_squared"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_3, act='relu2', layout='none')
return (%experts)
""",
        )

    def test_experts_weighted_input(self):
        self.assertExpectedInline(
            block("weighted_input"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_3, weight_on='input')
return (%experts)
""",
        )

    def test_experts_gathered_einsum(self):
        self.assertExpectedInline(
            block("gathered_einsum"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_4, None, None, %arg_3, layout='split')
return (%experts)
""",
        )

    def test_experts_dense_bmm(self):
        self.assertExpectedInline(
            block("dense_bmm"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_4, %arg_3, %arg_5, transposed=True)
return (%experts)
""",
        )

    def test_experts_where_loop(self):
        self.assertExpectedInline(
            block("where_loop"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_4, None, None, %arg_3, layout='split')
return (%experts)
""",
        )

    def test_experts_masked_loop(self):
        self.assertExpectedInline(
            block("masked_loop"),
            """\
%t: f32[16, 8] = aten.t(%arg)
%matmul: f32[6, 8] = aten.matmul(%arg_1, %t)
%route: (f32[6, 2], i32[6, 2]) = moe_fx.route(%matmul, top_k=2, renormalize='eps')
%getitem: i32[6, 2] = getitem(%route, 1)
%getitem_1: f32[6, 2] = getitem(%route, 0)
%experts: f32[6, 16] = moe_fx.experts(%arg_1, %getitem_1, %getitem, %arg_2, %arg_4, None, None, %arg_3, layout='split')
return (%experts)
""",
        )

    def test_rms_norm(self):
        weight = torch.randn(8).bfloat16()

        def fn(x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return weight * h.to(x.dtype)

        self.assertExpectedInline(
            rewritten(fn, torch.randn(4, 8).bfloat16()),
            """\
%rms_norm: bf16[4, 8] = moe_fx.rms_norm(%arg, %arg_1, 1e-06)
return (%rms_norm)
""",
        )

    def test_add_rms_norm(self):
        norm = nn.RMSNorm(8, eps=1e-5)

        def fn(x, residual):
            residual = residual.tanh() + x.tanh()
            return norm(residual), residual

        self.assertExpectedInline(
            rewritten(fn, torch.randn(4, 8), torch.randn(4, 8)),
            """\
%tanh: f32[4, 8] = aten.tanh(%arg)
%tanh_1: f32[4, 8] = aten.tanh(%arg_1)
%add_rms_norm: (f32[4, 8], f32[4, 8]) = moe_fx.add_rms_norm(%tanh, %tanh_1, %arg_2, 1e-05, cast='after')
%getitem: f32[4, 8] = getitem(%add_rms_norm, 1)
%getitem_1: f32[4, 8] = getitem(%add_rms_norm, 0)
return (%getitem_1, %getitem)
""",
        )

    def test_qk_norm_rope(self):
        q_proj, k_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        q_norm, k_norm = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)

        def rotate_half(x):
            first, second = x.chunk(2, -1)
            return torch.cat((-second, first), -1)

        def fn(x, cos, sin):
            q = q_norm(q_proj(x).view(2, 5, 4, 8)).transpose(1, 2)
            k = k_norm(k_proj(x).view(2, 5, 2, 8)).transpose(1, 2)
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

        inputs = torch.randn(2, 5, 32), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
        self.assertExpectedInline(
            rewritten(fn, *inputs),
            """\
%linear: f32[2, 5, 32] = aten.linear(%arg_1, %arg)
%view: f32[2, 5, 4, 8] = aten.view(%linear, [2, 5, 4, 8])
%linear_1: f32[2, 5, 16] = aten.linear(%arg_1, %arg_3)
%view_1: f32[2, 5, 2, 8] = aten.view(%linear_1, [2, 5, 2, 8])
%qk_norm_rope: (f32[2, 4, 5, 8], f32[2, 2, 5, 8]) = moe_fx.qk_norm_rope(%view, %view_1, %arg_2, %arg_4, %arg_5, %arg_6, 1e-06, cast='after')
%getitem: f32[2, 2, 5, 8] = getitem(%qk_norm_rope, 1)
%getitem_1: f32[2, 4, 5, 8] = getitem(%qk_norm_rope, 0)
return (%getitem_1, %getitem)
""",
        )

    def test_swiglu_with_a_sliced_weight(self):
        w13, w2 = nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(16, 24))

        def fn(x):
            return F.linear(F.silu(F.linear(x, w13[:24])) * F.linear(x, w13[24:]), w2)

        self.assertExpectedInline(
            rewritten(fn, torch.randn(4, 16)),
            """\
%linear: f32[4, 48] = aten.linear(%arg_1, %arg)
%swiglu: f32[4, 24] = moe_fx.swiglu(%linear)
%linear_1: f32[4, 16] = aten.linear(%swiglu, %arg_2)
return (%linear_1)
""",
        )
