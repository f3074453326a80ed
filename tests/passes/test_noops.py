"""No-ops disappear, everything that is not quite one survives, and nobody outside the graph can tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_with_report
from torch import nn

from moe_fx.passes.core import Level, MatchContext
from moe_fx.passes.graph import aten, is_op
from moe_fx.passes.normalize.noops import DropNoopsPass

pytestmark = pytest.mark.filterwarnings("ignore:moe_ascend. nothing in graph")
H = 8


class Model(nn.Module):
    """``function`` between two projections."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, H)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def compile_and_compare(fn, *inputs, dynamic=False):
    """The compiled callable's only report; results are compared bit for bit, on copies of the inputs."""
    with torch.no_grad():
        want = fn(*(x.clone() for x in inputs))
    compiled = compile_with_report(fn, dynamic=dynamic)
    got = compiled(*(x.clone() for x in inputs))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    (report,) = compiled.reports
    assert report.unfused_reason == ""
    return report


def operations(report, *packets):
    return [n for n in report.graph.graph.nodes if is_op(n, *packets)]


def drop_noops(gm):
    """The pass alone."""
    ctx = MatchContext(gm, Level.BITWISE)
    ctx.current = DropNoopsPass()
    ctx.current.run(ctx)
    gm.graph.lint()


NOOPS = {
    "detach": lambda x: x.detach(),
    "alias": lambda x: torch.ops.aten.alias(x),
    "view": lambda x: x.view(x.shape),
    "reshape": lambda x: x.reshape(2, 5, H),
    "flatten": lambda x: x.flatten(2),
    "unflatten": lambda x: x.unflatten(-1, (H,)),
    "view and back": lambda x: x.view(-1, H).view(2, 5, H),
    "expand": lambda x: x.expand(2, 5, H),
    "expand -1": lambda x: x.expand(-1, -1, H),
    "slice": lambda x: x[:, 0:],
    "slice beyond": lambda x: x[:, :99],
    "full slices": lambda x: x[..., :H][:, :, :],
    "to dtype": lambda x: x.to(x.dtype),
    "to device": lambda x: x.to(x.device),
    "to copy": lambda x: x.to(x.dtype, copy=True),
    "float": lambda x: x.float(),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "squeeze of unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze from the end": lambda x: x.unsqueeze(-2).squeeze(-2),
    "times 1.0": lambda x: x * 1.0,
    "times 1": lambda x: 1 * x,
    "divided by 1": lambda x: x / 1,
    "divided by 1.0": lambda x: x / 1.0,
    "dropout off": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "overwritten": lambda x: (x * 2).copy_(x),
    "chain": lambda x: (x.view(x.shape) * 1.0).detach()[:, 0:].to(x.dtype).unsqueeze(0).squeeze(0) / 1,
}


@pytest.mark.parametrize("name", NOOPS)
def test_noop_disappears(name):
    report = compile_and_compare(Model(NOOPS[name]), torch.randn(2, 5, H))
    called = [n for n in report.graph.graph.nodes if n.op == "call_function"]
    assert all(is_op(n, aten.linear, aten.zeros) for n in called), called
    assert len(operations(report, aten.linear)) == 2


DYNAMIC = ("view", "flatten", "expand -1", "slice", "full slices", "to copy", "squeeze of unsqueeze", "times 1.0")


@pytest.mark.parametrize("name", DYNAMIC)
def test_noop_disappears_under_dynamic_shapes(name):
    report = compile_and_compare(Model(NOOPS[name]), torch.randn(2, 5, H), dynamic=True)
    kept = (aten.linear, aten.sym_size)
    assert all(is_op(n, *kept) for n in report.graph.graph.nodes if n.op == "call_function")


# What is done between the projections -> the op that must survive.
NOT_NOOPS = {
    "slice that cuts": (lambda x: torch.cat((x[:, 1:], x[:, :1]), 1), aten.slice),
    "slice with a step": (lambda x: x[:, ::2], aten.slice),
    "slice from the end": (lambda x: x[:, -4:], aten.slice),
    "cast": (lambda x: x.bfloat16().float(), aten._to_copy),
    "plus 0.0": (lambda x: x + 0.0, aten.add),
    "times -1": (lambda x: x * -1.0, aten.mul),
    "times a tensor": (lambda x: x * torch.ones(H), aten.mul),
    "expand that broadcasts": (lambda x: x[:, :1].expand(-1, 5, -1) + 1, aten.expand),
    "expand with a new dimension": (lambda x: x.expand(3, 2, 5, H), aten.expand),
    "view that reshapes": (lambda x: x.view(5, 2, H), aten.view),
    "squeeze of another dimension": (lambda x: x[:1].unsqueeze(1).squeeze(0), aten.squeeze),
    "rounding division": (lambda x: torch.div(x, 1, rounding_mode="floor"), aten.div),
    "clone": (lambda x: x.clone(), aten.clone),
    "overwritten in another dtype": (lambda x: (x * 2).bfloat16().copy_(x).float(), aten.copy),
    "overwritten by a broadcast": (lambda x: (x * 2).copy_(x[:, :1]), aten.copy),
    "overwritten in another layout": (lambda x: (x * 2).copy_(x.mT.contiguous().mT), aten.copy),
}


@pytest.mark.parametrize("name", NOT_NOOPS)
def test_what_is_no_noop_survives(name):
    function, op = NOT_NOOPS[name]
    report = compile_and_compare(Model(function), torch.randn(2, 5, H))
    assert operations(report, op)


@pytest.mark.parametrize("function", [lambda i: i * 1.0, lambda i: i / 1], ids=["times 1.0", "divided by 1"])
def test_product_that_promotes_integers_survives(function):
    report = compile_and_compare(lambda i: torch.tanh(function(i)) * 2, torch.arange(6))
    assert operations(report, aten.mul, aten.div)


def test_dropout_in_training_survives():
    compiled = compile_with_report(Model(lambda x: F.dropout(x, 0.5, training=True)))
    compiled(torch.randn(2, 5, H))
    assert operations(compiled.reports[0], aten.dropout, aten.native_dropout)


def test_negative_zero_and_nan_pass_through():
    x = torch.tensor([-0.0, float("nan"), float("inf"), 1.0])
    compiled = compile_with_report(lambda x: torch.stack((x * 1.0, x / 1)))
    assert torch.equal(compiled(x).view(torch.int32), torch.stack((x, x)).view(torch.int32))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pass_is_idempotent(dynamic):
    def everything(x):
        for function in NOOPS.values():
            x = function(x) + 1
        return x

    compiled = compile_with_report(everything, dynamic=dynamic)
    compiled(torch.randn(2, 5, H))
    gm = compiled.reports[0].graph
    once = str(gm.graph)
    drop_noops(gm)
    assert str(gm.graph) == once


def test_pass_runs_alone_on_a_traced_graph():
    """The pass needs no more of a graph than FakeTensor values."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x):
        return torch.ops.aten.tanh(torch.ops.aten.mul(torch.ops.aten.alias(x), 1.0)[:, 0:].view(x.shape))

    gm = make_fx(function, tracing_mode="fake")(torch.randn(3, H))
    drop_noops(gm)
    gm.recompile()
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.tanh.default]
    x = torch.randn(3, H)
    assert torch.equal(gm(x), x.tanh())


# --- Layout -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "every other column": lambda x: (x[..., ::2] * 1.0).view(-1),
    "expanded": lambda x: (x[:, :1].expand(-1, 5, -1) / 1).view(-1),
    "reshaped transpose": lambda x: x.transpose(0, 1).reshape(-1).reshape(5, 2, H).view(-1),
    "channels last": lambda x: x[None].to(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(-1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_copy_that_changes_the_layout_survives(name):
    """A view further on needs the layout that the copy made."""
    compile_and_compare(lambda x: torch.tanh(LAYOUTS[name](x)), torch.randn(2, 5, H))


# --- What the caller sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 1.0,
        lambda x: (x * 1.0).t(),
        lambda x: x.t() * 1.0,
        lambda x: x.to(x.dtype, copy=True)[1:],
        lambda x: (x / 1).view(-1).split(4)[1],
    ],
    ids=["copy", "view of a copy", "copy of a view", "slice of a cast", "part of a quotient"],
)
def test_returned_copies_have_memory_of_their_own(function):
    compiled, x = compile_with_report(function), torch.randn(4, 4)
    before = x.clone()
    result = compiled(x)
    result.fill_(7.0)
    assert torch.equal(x, before)


def test_two_outputs_do_not_share_a_copy():
    def function(x):
        y = x.tanh()
        return y, y * 1.0

    first, second = compile_with_report(function)(torch.zeros(4, 4))
    second.fill_(7.0)
    assert torch.equal(first, torch.zeros(4, 4))


def test_copy_taken_before_its_input_is_overwritten():
    def function(x):
        old = (x * 1.0).t()
        x.add_(1)
        return old

    x = torch.randn(4, 4)
    before = x.clone()
    got = compile_with_report(function)(x)
    assert torch.equal(got, before.t())
    assert torch.equal(x, before + 1)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.view(x.shape), lambda x: x.detach(), lambda x: x[:], lambda x: x.view(-1), lambda x: x],
    ids=["view", "detach", "slice", "flat view", "itself"],
)
def test_output_that_aliases_an_input_still_does(function):
    x = torch.zeros(4, 4)
    result, other = compile_with_report(lambda x: (function(x), x + 1))(x)
    assert torch.equal(other, torch.ones(4, 4))
    x.fill_(3.0)
    assert torch.equal(result, torch.full_like(result, 3.0))


def test_input_returned_twice_under_two_names():
    compiled, x = compile_with_report(lambda x: (x.detach(), x.view(x.shape), x.tanh())), torch.zeros(3)
    a, b, _ = compiled(x)
    x.fill_(2.0)
    assert torch.equal(a, x) and torch.equal(b, x)
