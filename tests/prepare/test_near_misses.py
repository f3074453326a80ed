"""Blocks that look like MoE blocks, but compute something else: left as they are, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_fx


def reason(block: nn.Module) -> str:
    """Why the one block was left; its class and parameters are checked to be untouched."""
    kind = type(block)
    places = [p.data_ptr() for p in block.parameters()]
    report = moe_fx.prepare(block)
    assert len(report.left) == 1 and not report.prepared, report
    assert type(block) is kind and not hasattr(block, "_moe_fx")
    assert [p.data_ptr() for p in block.parameters()] == places
    return report.left[0].reason


def test_an_expert_with_another_activation(zoo):
    block = zoo.MaskedLoop().eval()
    block.experts[3].act = nn.GELU()
    assert reason(block) == "experts.3 differs from experts.0 in act: GELU instead of SiLU"


def test_an_expert_of_another_shape(zoo):
    block = zoo.MaskedLoop().eval()
    block.experts[5] = zoo.GatedMlp(inter=16)
    assert reason(block).startswith("experts.5 differs from experts.0 in")


def test_an_expert_with_an_option_of_its_own(zoo):
    class Scaled(zoo.GatedMlp):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    block = zoo.MaskedLoop(Scaled).eval()
    block.experts[2].factor = 3.0
    assert reason(block) == "experts.2 differs from experts.0 in factor: 3.0 instead of absent"


def test_results_scaled_behind_every_expert(zoo):
    class Halved(zoo.MaskedLoop):
        def combine(self, output, weight):
            return super().combine(output, weight) * 0.5

    assert "do not verify: relative L2 error" in reason(Halved().eval())


def test_weights_squared_in_the_loop(zoo):
    class Squared(zoo.MaskedLoop):
        def combine(self, output, weight):
            return super().combine(output, weight * weight)

    assert "do not verify" in reason(Squared().eval())


def test_one_expert_treated_differently(zoo):
    class Odd(zoo.MaskedLoop):
        def forward(self, hidden):
            out, logits = super().forward(hidden)
            return out + self.experts[0](hidden), logits

    assert "do" in reason(Odd().eval())


def test_dropout_that_is_active(zoo):
    def make():
        return nn.Sequential(zoo.GatedMlp(), nn.Dropout(0.1))

    assert "random numbers (aten.dropout" in reason(zoo.MaskedLoop(make).train())
    assert moe_fx.prepare(zoo.MaskedLoop(make).eval()).prepared


def test_a_router_with_noise(zoo):
    class Noisy(zoo.MaskedLoop):
        def scores(self, x):
            logits = super().scores(x)
            return logits + torch.randn_like(logits)

    assert "random numbers (aten.randn_like" in reason(Noisy().eval())


def test_state_kept_on_the_module(zoo):
    class Counting(zoo.MaskedLoop):
        calls = 0

        def forward(self, hidden):
            self.calls = self.calls + 1000
            return super().forward(hidden)

    assert "its forward stores calls on the module" in reason(Counting().eval())


def test_a_buffer_written_in_place(zoo):
    class Histogram(zoo.MaskedLoop):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, hidden):
            self.seen.add_(1)
            return super().forward(hidden)

    block = Histogram().eval()
    assert "writes to its own seen in place" in reason(block)
    assert block.seen.item() == 0


def test_no_router(zoo):
    class Everyone(zoo.MaskedLoop):
        def forward(self, hidden):
            return sum(expert(hidden) for expert in self.experts)

    assert reason(Everyone().eval()) == "no top-k selects the experts"


def test_weights_that_are_not_there_yet(zoo):
    with torch.device("meta"):
        block = zoo.MaskedLoop().eval()
    assert "meta device" in reason(block)


def test_hooks_on_an_expert(zoo):
    block = zoo.MaskedLoop().eval()
    block.experts[1].register_forward_hook(lambda module, args, output: output * 2)
    assert reason(block).startswith("experts.1 has forward hooks")


def test_a_forward_replaced_on_the_instance(zoo):
    block = zoo.MaskedLoop().eval()
    block.router.forward = lambda x: torch.zeros(x.shape[0], 8)
    assert reason(block).startswith("router's forward was replaced on the instance")


def test_a_shared_parameter(zoo):
    block = zoo.MaskedLoop().eval()
    block.experts[1].lift.weight = block.experts[0].lift.weight
    assert "shares a parameter" in reason(block)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 3)], ids=["linear", "conv"])
def test_models_without_experts(make):
    report = moe_fx.prepare(make())
    assert not report.blocks
    assert str(report) == "MoE blocks: none found"
