"""merge_views: merges what is safe, leaves what is not, and changes no value."""

from __future__ import annotations

import torch
from compiling import compile_with_report


def views(fn, *inputs, **options):
    compiled = compile_with_report(fn, **options)
    got = compiled(*inputs)
    torch.testing.assert_close(got, fn(*inputs), rtol=0, atol=0)
    graph = compiled.reports[0].graph.graph
    return [n for n in graph.nodes if n.target is torch.ops.aten.view.default]


def test_two_views_become_one():
    (view,) = views(lambda x: x.view(6, 4).view(2, 12).exp(), torch.randn(24))
    assert view.args[1] == [2, 12]


def test_a_chain_becomes_one():
    assert len(views(lambda x: x.view(6, 4).view(2, 12).view(4, 6).exp(), torch.randn(24))) == 1


def test_symbolic_sizes():
    assert len(views(lambda x: x.view(-1, 4).view(-1, 2, 2).exp(), torch.randn(6, 4), dynamic=True)) == 1


def test_first_view_with_another_consumer_stays():
    def fn(x):
        y = x.view(6, 4)
        return y.view(2, 12).exp(), y.sin()

    assert len(views(fn, torch.randn(24))) == 2


def test_a_copying_reshape_stays():
    def fn(x):
        return x.t().reshape(24).view(2, 12).exp()

    compiled = compile_with_report(fn)
    x = torch.randn(6, 4)
    assert torch.equal(compiled(x), fn(x))
