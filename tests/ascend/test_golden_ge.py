"""Goldens: the GE operators that one MoE block becomes, from torchair's own dump, for any number of tokens.

EXPECTTEST_ACCEPT=1 make test-ascend ARGS=tests/ascend/test_golden_ge.py regenerates them.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch_npu", reason="needs torch_npu over the CANN stand-in; run: make test-ascend")

import re
import tempfile
from pathlib import Path

import expecttest
import torch
from compiling import compile_with_report
from host_cann import ge_interpreter
from model_cases import Int8Layer, build

# Constants, and the arithmetic on shapes around the block.
_LEFT_OUT = ("Const", "Data", "NetOutput", "Shape", "Pack", "Gather", "Reshape", "Transpose", "Cast", "Fill")
_CALL = re.compile(r"= ge\.(\w+)\((.*)\)\s*$")
_ATTRIBUTE = re.compile(r"(\w+)=(\[[^\[\]]*\]|\"[^\"]*\"|attr\.\w+\([^()]*\)|[^,()\[\]{}]+)")
_UNNAMED = ("node_name", "dependencies", "outputs", "N", "dtype")


def ge_operators(name: str, **options: str) -> str:
    """The operators of a family's block for any number of tokens."""
    return operators_of(build(name).model.layers[1].mlp, torch.randn(2, 3, 64), dynamic=True, **options)


def operators_of(block: torch.nn.Module, x: torch.Tensor, dynamic: bool, **options: str) -> str:
    """One operator a line, with its attributes."""
    torch._dynamo.reset()
    ge_interpreter.COUNTS.clear()
    with tempfile.TemporaryDirectory() as folder:
        run = compile_with_report(
            block.to("npu"), dynamic=dynamic, fullgraph=True, downstream="torchair", strict=True, cache=False,
            downstream_options={"debug.graph_dump": {"type": "py", "path": folder}}, **options,
        )  # fmt: skip
        run(x.npu())
        (dump,) = Path(folder).glob("dynamo_original_graph_*.py")
        lines = dump.read_text().splitlines()
    operators = []
    for line in lines:
        call = _CALL.search(line)
        if call is None:
            continue
        kind, arguments = call[1], call[2]
        if kind not in _LEFT_OUT:
            given = [f"{key}={value}" for key, value in _ATTRIBUTE.findall(arguments) if key not in _UNNAMED]
            operators.append(f"{kind}({', '.join(given)})")
    # Operators that converters of our own make are in the graph, but not in torchair's dump of it.
    dumped = {operator.partition("(")[0] for operator in operators}
    own = sorted(kind for kind in ge_interpreter.COUNTS if kind.startswith("Moe") and kind not in dumped)
    return "\n".join([*operators, *(f"and {kind}" for kind in own)]) + "\n"


class GoldenGE(expecttest.TestCase):
    maxDiff = None

    def test_qwen3_moe(self):
        self.assertExpectedInline(
            ge_operators("qwen3_moe"),
            """\
MatMul()
MoeGatingTopKSoftmax(k=2)
ReduceSum(keep_dims=True)
RealDiv()
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
""",
        )

    def test_qwen3_moe_token_unpermute(self):
        self.assertExpectedInline(
            ge_operators("qwen3_moe", ascend_combine="token_unpermute"),
            """\
MatMul()
MoeGatingTopKSoftmax(k=2)
ReduceSum(keep_dims=True)
RealDiv()
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
and MoeTokenUnpermute
""",
        )

    def test_int8_experts_combined_in_the_product(self):
        options = dict(ascend_combine="grouped_matmul_finalize_routing")
        self.assertExpectedInline(
            operators_of(Int8Layer(), torch.randn(5, 256).bfloat16(), dynamic=False, **options),
            """\
MatMul()
MoeGatingTopKSoftmax(k=2)
ReduceSum(keep_dims=True)
RealDiv()
DynamicQuant(dst_type=2)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=6, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 6], row_idx_type=1)
GroupedMatmulSwigluQuantV2(dequant_mode=0, dequant_dtype=0, quant_mode=0, quant_dtype=2, transpose_weight=False, group_list_type=1, tuning_config=[0])
IndexByTensor(indices_mask=[1])
FloorDiv()
GroupedMatmulFinalizeRouting(shared_input_weight=1.0, shared_input_offset=0, transpose_x=False, transpose_w=False, output_bs=5, group_list_type=1, tuning_config=[0])
Add()
""",
        )

    def test_int8_experts(self):
        self.assertExpectedInline(
            operators_of(Int8Layer(), torch.randn(5, 256).bfloat16(), dynamic=True),
            """\
MatMul()
MoeGatingTopKSoftmax(k=2)
ReduceSum(keep_dims=True)
RealDiv()
DynamicQuant(dst_type=2)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=6, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 6], row_idx_type=0)
GroupedMatmulSwigluQuantV2(dequant_mode=0, dequant_dtype=0, quant_mode=0, quant_dtype=2, transpose_weight=False, group_list_type=1, tuning_config=[0])
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
Add()
""",
        )

    def test_deepseek_v3(self):
        self.assertExpectedInline(
            ge_operators("deepseek_v3"),
            """\
MatMul()
MoeGatingTopK(k=2, k_group=2, group_count=4, group_select_mode=1, renorm=0, norm_type=1, out_flag=False, routed_scaling_factor=2.5, eps=1e-20)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
BatchMatMul()
BatchMatMul()
Swish()
Mul()
BatchMatMul()
Add()
""",
        )

    def test_glm4_moe(self):
        self.assertExpectedInline(
            ge_operators("glm4_moe"),
            """\
MatMul()
MoeGatingTopK(k=2, k_group=1, group_count=1, group_select_mode=0, renorm=0, norm_type=1, out_flag=False, routed_scaling_factor=1.0, eps=1e-20)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
BatchMatMul()
BatchMatMul()
Swish()
Mul()
BatchMatMul()
Add()
""",
        )

    def test_minimax_m2(self):
        self.assertExpectedInline(
            ge_operators("minimax_m2"),
            """\
MatMul()
MoeGatingTopK(k=2, k_group=1, group_count=1, group_select_mode=0, renorm=0, norm_type=1, out_flag=False, routed_scaling_factor=1.0, eps=0.0)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
""",
        )

    def test_afmoe(self):
        self.assertExpectedInline(
            ge_operators("afmoe"),
            """\
MatMul()
MoeGatingTopK(k=2, k_group=1, group_count=1, group_select_mode=0, renorm=0, norm_type=1, out_flag=False, routed_scaling_factor=2.0, eps=1e-20)
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
SwiGlu(dim=-1)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
MatMul()
MatMul()
Swish()
Mul()
MatMul()
Add()
""",
        )

    def test_gpt_oss(self):
        self.assertExpectedInline(
            ge_operators("gpt_oss"),
            """\
MatMulV2()
Mul()
Add()
MoeInitRoutingV3(active_num=-1, expert_capacity=-1, expert_num=16, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, 16], row_idx_type=0)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
ClippedSwiglu(dim=-1, alpha=1.702, limit=7.0, bias=1.0, interleaved=True)
GroupedMatmul(split_item=3, transpose_weight=False, transpose_x=False, group_type=0, group_list_type=1, act_type=0, tuning_config=[0])
MoeFinalizeRoutingV2(drop_pad_mode=2, k=2)
and MoeGatingTopKSoftmaxV2
""",
        )
