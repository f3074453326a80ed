"""Experts that are started and awaited through plain function pointers, as a device stream's host callback does it."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from moe_fx import _C
from moe_fx.lowering.cpu.packing import PackedSpec, Packer

HIDDEN, INTER, EXPERTS, TOP_K, TOKENS = 128, 64, 6, 2, 5


class Layer:
    """A packed int8 layer with operands of its own, and a submission on them."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng).to(torch.bfloat16)

        packer = Packer(PackedSpec("int8", EXPERTS, HIDDEN, INTER, True, 0, False, False, 1))
        for expert in range(EXPERTS):
            for projection, shape in (("gate", (INTER, HIDDEN)), ("up", (INTER, HIDDEN)), ("down", (HIDDEN, INTER))):
                packer.quantize(expert, projection, normal(*shape) * 0.1)
        self.packed = packer.packed
        self.x = normal(TOKENS, HIDDEN)
        self.weights = torch.rand(TOKENS, TOP_K, generator=rng)
        self.ids = torch.stack([torch.randperm(EXPERTS, generator=rng)[:TOP_K] for _ in range(TOKENS)]).int()
        self.y = torch.full((TOKENS, HIDDEN), float("nan"), dtype=torch.bfloat16)
        self.submission = _C.Submission(
            self.packed.data_ptr(), self.packed.numel(), "silu", 1.0, None, False, True,
            self.x.data_ptr(), "bf16", TOKENS, TOP_K, self.weights.data_ptr(), "f32",
            self.ids.data_ptr(), False, 0, 0, self.y.data_ptr(), "bf16",
        )  # fmt: skip

    def expected(self, tokens: int = TOKENS) -> torch.Tensor:
        from moe_fx.lowering.cpu import engine

        assert engine
        return torch.ops.moe_fx_cpu.experts_packed(
            self.x[:tokens], self.weights[:tokens], self.ids[:tokens], self.packed, dynamic_activations=True
        )


# As a stream's callback is declared: void (*)(void*). ctypes releases the interpreter's lock around the call.
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_callbacks_run_the_layer() -> None:
    layer = Layer(0)
    submit, wait = CALLBACK(_C.Submission.submit_callback), CALLBACK(_C.Submission.wait_callback)
    submit(layer.submission.address)
    wait(layer.submission.address)
    assert layer.submission.done()
    assert torch.equal(layer.y, layer.expected())


def test_several_layers_are_in_flight_from_several_threads() -> None:
    layers = [Layer(seed) for seed in range(8)]
    submit, wait = CALLBACK(_C.Submission.submit_callback), CALLBACK(_C.Submission.wait_callback)

    def drive(mine: list[Layer]) -> None:
        for _ in range(20):
            for layer in mine:
                submit(layer.submission.address)
        for layer in mine:
            wait(layer.submission.address)

    threads = [threading.Thread(target=drive, args=(layers[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer in layers:
        assert torch.equal(layer.y, layer.expected())


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_run_may_have_fewer_tokens(tokens: int) -> None:
    layer = Layer(1)
    layer.submission.submit(tokens)
    layer.submission.wait()
    assert torch.equal(layer.y[:tokens], layer.expected(tokens))
    assert layer.y[tokens:].isnan().all()


def test_operands_change_between_runs() -> None:
    layer = Layer(2)
    for scale in (1.0, -2.0):
        layer.x.mul_(scale)
        layer.submission.submit(TOKENS)
        layer.submission.wait()
        assert torch.equal(layer.y, layer.expected())


def test_bad_operands_are_refused_when_it_is_made() -> None:
    packed = Layer(3).packed
    with pytest.raises(ValueError, match="act is 'tanh'"):
        _C.Submission(packed.data_ptr(), packed.numel(), "tanh", 1.0, None, False, True, 0, "bf16", 1, 1, 0, "f32",
                      0, False, 0, 0, 0, "bf16")  # fmt: skip
