"""A peer's side of the benchmark: a process that makes layers and times calls as it is told, JSON lines both ways.

Requests, on standard input, and their answers, on standard output:

    {"do": "load", "form": "bf16", "shape": {...}, "layers": 2, "threads": 2}
        {"op": "what is called", "error": relative error of a checked call, "expert_bytes": bytes read per expert}
        or {"unavailable": "why"}
    {"do": "time", "tokens": 4, "first": 0, "calls": 3}
        {"seconds": [...], "experts": [...]}   one entry a call: its time, and how many experts it hit

Libraries print as they like: what they write to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from layer import ROUTINGS, Routed, Shape, Weights, random_weights, relative_error, routed

CHECKED_TOKENS = 5

Call = Callable[[Routed], torch.Tensor]


class Unavailable(Exception):
    """A form that the peer does not offer here; the message says why."""


@dataclass
class Layer:
    """A layer as a peer holds it."""

    call: Call
    expert_bytes: float


@dataclass
class Form:
    """How a peer serves a weight format."""

    op: str
    prepare: Callable[[Weights, Shape, int], Layer]
    """Weights, shape and threads to the layer."""
    max_tokens: int | None = None


def stored_bytes(shape: Shape, *tensors: torch.Tensor) -> float:
    """Bytes per expert of tensors that hold a layer's weights, scales and zeros."""
    return sum(tensor.nbytes for tensor in tensors) / shape.experts


def calls(layers: list[Layer], inputs: list[Routed], first: int, count: int) -> tuple[list[float], list[int]]:
    """Times ``count`` calls from the ``first`` on, each on the next layer and routing: seconds, and experts hit."""
    seconds, experts = [], []
    for index in range(first, first + count):
        layer, operands = layers[index % len(layers)], inputs[index % len(inputs)]
        start = time.perf_counter()
        layer.call(operands)
        seconds.append(time.perf_counter() - start)
        experts.append(operands.experts_hit)
    return seconds, experts


def inputs_for(shape: Shape, tokens: int) -> list[Routed]:
    """The operands that calls go through in turn."""
    return [routed(shape, tokens, index) for index in range(ROUTINGS)]


def serve(forms: Mapping[str, Form]) -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = _Session(forms)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = session.answer(request)
        except Unavailable as reason:
            answer = {"unavailable": str(reason)}
        except Exception as error:
            answer = {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Session:
    def __init__(self, forms: Mapping[str, Form]) -> None:
        self._forms = forms
        self._layers: list[Layer] = []
        self._inputs: dict[int, list[Routed]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "load":
            return self._load(request)
        tokens = request["tokens"]
        if self._form.max_tokens is not None and tokens > self._form.max_tokens:
            raise Unavailable(f"at most {self._form.max_tokens} tokens")
        if tokens not in self._inputs:
            self._inputs = {tokens: inputs_for(self._shape, tokens)}
        first = request["first"]
        with torch.inference_mode():
            # One call that does not count wakes the threads, which sleep between requests.
            calls(self._layers, self._inputs[tokens], first, 1)
            seconds, experts = calls(self._layers, self._inputs[tokens], first + 1, request["calls"])
        return {"seconds": seconds, "experts": experts}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        self._shape = shape = Shape(**request["shape"])
        if request["form"] not in self._forms:
            raise Unavailable("no such form")
        self._form = form = self._forms[request["form"]]
        error = 0.0
        for seed in range(request["layers"]):
            weights = random_weights(shape, request["form"], seed)
            layer = form.prepare(weights, shape, request["threads"])
            self._layers.append(layer)
            if seed == 0:
                with torch.inference_mode():
                    error = relative_error(weights, routed(shape, CHECKED_TOKENS, ROUTINGS), layer.call)
        return {"op": form.op, "error": error, "expert_bytes": self._layers[0].expert_bytes}
