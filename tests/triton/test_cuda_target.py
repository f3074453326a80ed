"""The CUDA target: its ops keep the canonical contracts, graphs are lowered to them, and models still agree with eager.

Without a GPU the kernels run in Triton's interpreter, on tiny models.
"""

from __future__ import annotations

import pytest
import torch
from compiling import compile_with_report, relative_error
from kernel_checks import DEVICE, gpu_only, on_device
from moe_families import FAMILIES, token_ids
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import moe_fx.lowering.cuda as cuda
from moe_fx.lowering.cuda import TARGET, gating, qk_norm_rope, repack, swiglu
from moe_fx.lowering.cuda.device import INTERPRETED
from moe_fx.lowering.cuda.ops import KERNELS
from moe_fx.lowering.ops import CANONICAL_OPS

LOGITS_BOUND = 2e-2


def samples(name: str, dtype: torch.dtype):
    return CANONICAL_OPS[name].samples(dtype, torch.Generator().manual_seed(0))


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", KERNELS)
def test_schema_is_the_canonical_one(name: str) -> None:
    ours, canonical = (str(op._schema) for op in (KERNELS[name].overload, CANONICAL_OPS[name].overload))
    assert ours == canonical.replace("moe_fx::", "moe_fx_cuda::")


@pytest.mark.parametrize("name", KERNELS)
def test_fake_results_are_like_real_ones(name: str) -> None:
    op = KERNELS[name]
    # The interpreter is slow; every third sample still has every shape of operands.
    for sample in list(samples(name, torch.bfloat16))[:: 3 if INTERPRETED else 1]:
        if op.refusal(*sample.args, **sample.kwargs) is not None:
            continue
        args = tuple(map(on_device, sample.args))
        real = outputs(op.overload(*args, **sample.kwargs))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = outputs(op.overload(*fakes, **sample.kwargs))
        for is_real, is_fake in zip(real, fake, strict=True):
            same = [(t.shape, t.dtype, t.stride(), t.device) for t in (is_real, is_fake)]
            assert same[0] == same[1], sample.name


def compiled_on_cuda(model: nn.Module, **options):
    return compile_with_report(model.to(DEVICE), target="cuda", **options)


def kernels(compiled) -> set[tuple[str, str]]:
    return {(site.kind, site.kernel) for report in compiled.reports for site in report.matched}


@pytest.mark.parametrize("downstream", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_agree_with_eager(name: str, downstream: str) -> None:
    if downstream == "inductor" and DEVICE == "cpu" and name != "qwen3_moe":
        pytest.skip("one model shows that Inductor takes the ops; a GPU runs all: make test ARGS='-m gpu'")
    family = FAMILIES[name]
    model = family.build().to(DEVICE)
    ids = token_ids(1, 5).to(DEVICE)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    compiled = compiled_on_cuda(model, downstream=downstream, fullgraph=True)
    got = compiled(ids, use_cache=False).logits
    assert compiled.counts == family.budget
    assert {kernel for _, kernel in kernels(compiled)} == {"Triton"}
    assert relative_error(got, want) <= LOGITS_BOUND


def test_dynamic_token_counts_share_one_graph() -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1).to(DEVICE)
    compiled = compiled_on_cuda(model, dynamic=True)
    for length in (2, 5, 23):  # 23 tokens leave the kernels for few tokens.
        ids = token_ids(1, length).to(DEVICE)
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        assert relative_error(compiled(ids, use_cache=False).logits, want) <= LOGITS_BOUND
    assert len(compiled.reports) == 1


class NormOfTransposed(nn.Module):
    """Views a norm's result in the order that its reference, which keeps its input's strides, has it in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.moe_fx.rms_norm(x.transpose(0, 1), self.weight, 1e-6)
        return y.transpose(0, 1).view(-1)


def test_a_view_that_only_the_reference_allows_becomes_a_copy() -> None:
    x = torch.randn(4, 3, 16, device=DEVICE)
    compiled = compiled_on_cuda(NormOfTransposed())
    torch.testing.assert_close(compiled(x), NormOfTransposed().to(DEVICE)(x), rtol=1e-5, atol=1e-6)
    assert kernels(compiled) == {("norm", "Triton")}


class Routed(nn.Module):
    """A router with more choices than the gating kernel takes."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.moe_fx.route(logits, top_k=self.top_k)


def test_what_the_kernel_refuses_keeps_its_reference_and_says_why() -> None:
    logits = torch.randn(3, 64, device=DEVICE)
    compiled = compiled_on_cuda(Routed(40))
    weights, ids = compiled(logits)
    want_weights, want_ids = Routed(40)(logits)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)
    ((_, kernel),) = kernels(compiled)
    assert kernel.startswith("reference: ") and "40" in kernel


def test_without_triton_everything_keeps_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ops_or_reason", lambda: (None, "Triton cannot be imported (no module)"))
    compiled = compiled_on_cuda(Routed(4))
    compiled(torch.randn(3, 64, device=DEVICE))
    assert kernels(compiled) == {("router", "reference: Triton cannot be imported (no module)")}


def test_operands_on_two_devices_are_refused() -> None:
    graph = fx.Graph()
    with FakeTensorMode():
        given = [torch.empty(3, 16, device=device) for device in ("cpu", "meta")]
    nodes = []
    for i, fake in enumerate(given):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = fake
    node = graph.call_function(torch.ops.moe_fx.swiglu.default, tuple(nodes))
    assert "several devices (cpu, meta)" in TARGET.kernel_for(node, "eager")


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@gpu_only
def test_calls_can_be_captured_in_a_cuda_graph() -> None:
    model = FAMILIES["qwen3_moe"].build().to(DEVICE)
    ids = token_ids(1, 5).to(DEVICE)
    compiled = compiled_on_cuda(model, downstream="inductor")
    want = compiled(ids, use_cache=False).logits
    from moe_fx.lowering.cuda.timing import capture

    results = []
    with torch.no_grad():
        graph = capture(lambda: results.append(compiled.fn(ids, use_cache=False).logits))
    results[-1].zero_()
    graph.replay()
    torch.testing.assert_close(results[-1], want, rtol=0, atol=0)


def split_heads(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ones = torch.ones(16, device=x.device)
    return qk_norm_rope.split_qkv_norm_rope(x, ones, ones, x[:, :16], None, 2, 1, 16)


BY_HAND = {
    "op": torch.ops.moe_fx_cuda.swiglu,
    "swiglu_quant": swiglu.swiglu_quant,
    "padded route": lambda x: gating.route(x, top_k=2, num_valid=torch.tensor(2, device=x.device)),
    "repack": lambda x: repack.to_planar(x.view(torch.uint8).contiguous(), "canonical", 32),
    "split qkv": split_heads,
}


@gpu_only
@pytest.mark.parametrize("call", BY_HAND)
def test_kernels_run_on_the_device_of_their_operands(call: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(3, 64, device="cuda:1")
    there, here = BY_HAND[call](x), BY_HAND[call](x.to("cuda:0"))
    for result, want in zip(outputs(there), outputs(here), strict=True):
        assert result.device == x.device
        assert torch.equal(result.cpu(), want.cpu())


def experts_named(count: int) -> dict[str, int]:
    """A number of experts under each name that a configuration may have for it, or for an alias of it."""
    return dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count)


# Layers at their models' real shapes: four of them, with a small vocabulary. DeepSeek-V3's take about 100 GiB.
REAL = {
    "qwen3_moe": dict(
        hidden_size=2048, moe_intermediate_size=768, num_experts_per_tok=8, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_hidden_layers=4, max_position_embeddings=1024,
        **experts_named(128),
    ),
    "deepseek_v3": dict(
        hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_experts_per_tok=8, n_group=8, topk_group=4, num_attention_heads=128, num_key_value_heads=128,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64,
        num_hidden_layers=4, first_k_dense_replace=1, max_position_embeddings=1024,
        **experts_named(256),
    ),
    "gpt_oss": dict(
        hidden_size=2880, intermediate_size=2880, num_experts_per_tok=4, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_hidden_layers=4, max_position_embeddings=1024,
        **experts_named(128),
    ),
}  # fmt: skip
REAL_GIB = {"qwen3_moe": 10, "deepseek_v3": 110, "gpt_oss": 30}


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_layers_are_as_near_to_the_truth_as_peers_are(name: str) -> None:
    """The truth is the same model in fp32, where it fits the memory, else eager.

    Bound: twice the farther peer's distance, at least 0.01. Routers choose other experts on ties and near them, so that
    whole models of random weights differ by much in narrow dtypes.
    """
    if torch.cuda.mem_get_info()[0] < REAL_GIB[name] << 30:
        pytest.skip(f"needs {REAL_GIB[name]} GiB of free GPU memory")
    with torch.device(DEVICE):
        model = FAMILIES[name].build(**REAL[name])
    ours = compiled_on_cuda(model, downstream="inductor", dynamic=True)
    runners = {"moe_ascend": ours, "eager": model, "Inductor": torch.compile(model)}
    prompts = [token_ids(1, length).to(DEVICE) for length in (1, 17, 512)]
    with torch.no_grad():
        logits = {who: [run(ids, use_cache=False).logits for ids in prompts] for who, run in runners.items()}
        truth = "eager"
        if torch.cuda.mem_get_info()[1] > 3 * REAL_GIB[name] << 30:
            truth = "fp32"
            torch._dynamo.reset()
            model.float()
            logits[truth] = [model(ids, use_cache=False).logits for ids in prompts]
    for i, ids in enumerate(prompts):
        far = {who: relative_error(got[i], logits[truth][i]) for who, got in logits.items() if who != truth}
        print(f"{name}, {ids.numel()} tokens from {truth}: {', '.join(f'{who} {by:.2e}' for who, by in far.items())}")
        assert far.pop("moe_ascend") <= max(2 * max(far.values()), 1e-2)
