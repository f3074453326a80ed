"""Prepared weights: when they are made and made again, in which modes and threads, who shares them, when they go."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import fx

from moe_fx.lowering import prepared_inputs
from moe_fx.lowering.prepared_inputs import hoist, recipe, weights_changed

made: list[torch.Size] = []


@recipe("(Tensor[] weights, *, int times=1) -> Tensor")
def turned_for_tests(weights: list[torch.Tensor], *, times: int = 1) -> torch.Tensor:
    made.append(weights[0].shape)
    time.sleep(0.01)  # Long enough for a second thread to arrive meanwhile.
    # A view, and a write into a fresh tensor: what recipes do with sources that may be inference tensors.
    result = torch.empty_like(weights[0].t(), memory_format=torch.contiguous_format)
    return result.copy_(weights[0].t()).mul_(times)


@pytest.fixture(autouse=True)
def nothing_made() -> Iterator[None]:
    made.clear()
    yield
    gc.collect()


def compiled(*, times: int = 1, inputs: list[Any]) -> Callable[..., torch.Tensor]:
    """``x @ prepared(weight)`` as a compiler would give it back, for inputs x and weight."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    turned = graph.call_function(torch.ops.moe_fx_prepare.turned_for_tests.default, ([weight],), {"times": times})
    graph.output(graph.call_function(torch.ops.aten.mm.default, (x, turned)))
    gm = fx.GraphModule({}, graph)
    _, with_prepared = hoist(gm, inputs)
    made.clear()
    return with_prepared(gm.forward)


def parameters() -> list[Any]:
    return [torch.randn(2, 3), torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)]


def expect(inputs: list[Any]) -> torch.Tensor:
    return inputs[0] @ inputs[1].t()


def prepared(call: Any) -> list[torch.Tensor]:
    return [value.tensor for value in call._values.values()]


def test_a_write_that_the_counter_sees_is_followed_into_the_same_memory():
    inputs = parameters()
    call = compiled(inputs=inputs)
    call(*inputs)
    address = prepared(call)[0].data_ptr()
    with torch.no_grad():
        inputs[1].add_(1)
    assert torch.equal(call(*inputs), expect(inputs))
    inputs[1].data = torch.randn(4, 3)
    assert torch.equal(call(*inputs), expect(inputs))
    call(*inputs)
    assert len(made) == 3 and prepared(call)[0].data_ptr() == address


def test_a_write_through_data_is_followed_once_it_is_told():
    inputs, others = parameters(), parameters()
    call = compiled(inputs=inputs)
    call(*inputs), call(*others)
    addresses = [tensor.data_ptr() for tensor in prepared(call)]
    before = expect(inputs)
    inputs[1].data.copy_(torch.randn(4, 3))
    others[1].data += 1
    assert torch.equal(call(*inputs), before), "nothing tells: this is what the documentation warns of"
    weights_changed()
    assert torch.equal(call(*inputs), expect(inputs)) and torch.equal(call(*others), expect(others))
    assert len(made) == 4, "every weight once"
    call(*inputs), call(*others)
    assert len(made) == 4 and [tensor.data_ptr() for tensor in prepared(call)] == addresses


def test_inference_tensors_are_followed_by_address_and_when_told():
    with torch.inference_mode():
        inputs = parameters()
        replacement = torch.randn(4, 3)
    call = compiled(inputs=inputs)
    assert torch.equal(call(*inputs), expect(inputs)), "outside inference mode"
    address = prepared(call)[0].data_ptr()
    with torch.inference_mode():
        inputs[1].mul_(2)
        call(*inputs)
        assert len(made) == 1
        weights_changed()
        assert torch.equal(call(*inputs), expect(inputs))
        inputs[1].data = replacement
        assert torch.equal(call(*inputs), expect(inputs))
    weights_changed()
    assert torch.equal(call(*inputs), expect(inputs))
    assert len(made) == 4 and prepared(call)[0].data_ptr() == address


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("later", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_made_in_one_mode_and_made_again_in_another(
    first: Callable[[], AbstractContextManager[Any]], later: Callable[[], AbstractContextManager[Any]]
):
    inputs = [torch.randn(2, 3), torch.nn.Parameter(torch.randn(4, 3))]
    with first():
        call = compiled(inputs=inputs)
        call(*inputs)
    (tensor,) = prepared(call)
    assert not tensor.is_inference() and not tensor.requires_grad
    with later():
        with torch.no_grad():
            inputs[1].mul_(2)
        assert torch.equal(call(*inputs), expect(inputs))
    assert len(made) == 2


def test_through_torch_compile_in_inference_mode_and_out_of_it():
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from moe_fx.downstream import compile_graph

        return compile_graph("aot_eager", gm, inputs)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ops.moe_fx_prepare.turned_for_tests([self.weight])

    model, x = Model(), torch.randn(2, 3)
    call = torch.compile(model, backend=backend)
    with torch.inference_mode():
        assert torch.allclose(call(x), x @ model.weight.t())
    with torch.no_grad():
        model.weight.mul_(2)
        assert torch.allclose(call(x), x @ model.weight.t())
        model.weight.data.add_(1)
        weights_changed()
        assert torch.allclose(call(x), x @ model.weight.t())


def test_dropping_the_callable_frees_the_prepared_weight():
    inputs = parameters()
    call = compiled(inputs=inputs)
    call(*inputs)
    tensor = weakref.ref(prepared(call)[0])
    del call
    gc.collect()
    assert tensor() is None
    assert weakref.getweakrefcount(inputs[1]) == 0, "nothing is left on the weight"


def test_dropping_the_weight_frees_the_prepared_weight():
    inputs = parameters()
    call: Any = compiled(inputs=inputs)
    call(*inputs)
    tensor = weakref.ref(prepared(call)[0])
    del inputs[1]
    gc.collect()
    assert tensor() is None and not call._values and not call._watches


def test_graphs_share_a_prepared_weight_until_the_last_one_goes():
    inputs = parameters()
    prefill, decode = compiled(inputs=inputs), compiled(inputs=inputs)
    prefill(*inputs), decode(*inputs)
    assert len(made) == 1 and prepared(prefill)[0] is prepared(decode)[0]
    with torch.no_grad():
        inputs[1].mul_(2)
    assert torch.equal(decode(*inputs), expect(inputs)) and torch.equal(prefill(*inputs), expect(inputs))
    assert len(made) == 2, "made again for both at once"
    tensor = weakref.ref(prepared(decode)[0])
    del prefill
    gc.collect()
    assert torch.equal(decode(*inputs), expect(inputs)) and len(made) == 2
    del decode
    gc.collect()
    assert tensor() is None and not prepared_inputs._shared


def test_other_arguments_or_weights_are_not_shared():
    inputs, others = parameters(), parameters()
    once, twice = compiled(inputs=inputs), compiled(times=2, inputs=inputs)
    assert torch.equal(once(*inputs), expect(inputs)) and torch.equal(twice(*inputs), 2 * expect(inputs))
    assert torch.equal(once(*others), expect(others))
    assert len(made) == 3


def test_a_model_moved_to_another_dtype_is_not_given_the_old_one():
    inputs = parameters()
    single = compiled(inputs=inputs)
    single(*inputs)
    inputs[1].data = inputs[1].data.double()
    inputs[0] = inputs[0].double()
    double = compiled(inputs=inputs)
    assert torch.equal(double(*inputs), expect(inputs))


def test_threads_at_their_first_calls_prepare_once():
    inputs = parameters()
    calls = [compiled(inputs=inputs) for _ in range(2)]
    start, results = threading.Barrier(4), []

    def work(call: Callable[..., torch.Tensor]) -> None:
        start.wait()
        results.append(call(*inputs))

    threads = [threading.Thread(target=work, args=(call,)) for call in calls * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(results) == 4
    assert all(torch.equal(result, expect(inputs)) for result in results)
