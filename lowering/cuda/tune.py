"""Finding launch parameters of the expert kernels by measurement, for the file that ``configs`` reads.

For each token count, the kernels for few pairs and those over tiles are tuned apart, a kernel at a time until none gets
faster, over the values that the launchers offer (``TUNABLE``), on the time of the whole call; the faster of the two
becomes the entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from triton.errors import TritonError

from moe_fx.lowering.cuda import configs, experts, experts_int4, gating, timing

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)
# Beyond so many tokens, kernels that read an expert once for each of its pairs have no chance.
_MOST_TOKENS_IN_PAIRS = 64
# A candidate must be so much faster to be taken: less is noise, and a stable file is worth more.
_GAIN = 0.01
# A kernel's parameters are tried in all combinations if there are no more, else one is changed at a time.
_MOST_COMBINATIONS = 64
# Elements of a block that a thread of a pairs kernel holds: beyond, unrolled code takes minutes to compile.
_MOST_ELEMENTS = 128
_SWITCH = "PAIRS"
_EVERY_PAIR = 1 << 30

Choices = Mapping[str, Mapping[str, tuple[int, ...]]]
Chosen = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Shape:
    """A layer of experts: hidden size H, intermediate size I, E experts of which each token takes k."""

    hidden: int = 2048
    inter: int = 768
    n_experts: int = 128
    top_k: int = 8
    group: int = 128


@dataclass(frozen=True)
class Format:
    """Weights of one format: the launcher's choices, experts a token, and a call at a number of tokens."""

    choices: Choices
    top_k: int
    call: Callable[[int], Callable[[], object]]


def tune(
    shape: Shape,
    formats: Iterable[str],
    tokens: Iterable[int],
    table: configs.Table,
    progress: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Measure on the current device and put the entries found into ``table``.

    Args:
        formats: keys of ``FORMATS``.
        table: entries from earlier; those for other kernels, variants and counts stay.
        progress: told of each count when it is done. save: called then, too.
    """
    for name in formats:
        weights = FORMATS[name](shape)
        for count in sorted(tokens):
            chosen, variants, microseconds = tune_count(weights, count)
            for kernel, parameters in chosen.items():
                table.setdefault(kernel, {}).setdefault(variants[kernel], {})[count] = parameters
            save()
            progress(f"{name}, {count} tokens: {microseconds:.1f} us, {_in_words(chosen)}")


def tune_count(weights: Format, tokens: int) -> tuple[Chosen, dict[str, str], float]:
    """The best parameters at one token count, the variant that each kernel was looked up under, and the time."""
    call = weights.call(tokens)
    (switch,) = (kernel for kernel, parameters in weights.choices.items() if _SWITCH in parameters)
    in_pairs = {kernel: given for kernel, given in weights.choices.items() if kernel.endswith("_pairs")}
    in_tiles = {k: given for k, given in weights.choices.items() if k not in in_pairs and k != switch}
    found = [(*_descend(call, switch, 0, in_tiles), 0)]
    if tokens <= _MOST_TOKENS_IN_PAIRS:
        found.append((*_descend(call, switch, _EVERY_PAIR, in_pairs), _EVERY_PAIR))
    microseconds, chosen, variants, switched = min(found, key=lambda each: each[0])
    # Entries serve counts near theirs, too: not more pairs than were measured.
    return {switch: {_SWITCH: tokens * weights.top_k if switched else 0}, **chosen}, variants, microseconds


def _descend(
    call: Callable[[], object], switch: str, switched: int, choices: Choices
) -> tuple[float, Chosen, dict[str, str]]:
    """Change a kernel's parameters, keep what is faster, until nothing is."""
    with configs.recorded() as looked_up, configs.forced({switch: {_SWITCH: switched}}):
        best = _time(call, {})
    chosen: Chosen = {kernel: dict(looked_up[kernel][1]) for kernel in choices if kernel in looked_up}
    variants = {kernel: variant for kernel, (variant, _) in looked_up.items()}
    improved = True
    while improved:
        improved = False
        for kernel in chosen:
            for change in _changes(choices[kernel]):
                parameters = {**chosen[kernel], **change}
                if parameters == chosen[kernel]:
                    continue
                if kernel.endswith("_pairs") and _elements_a_thread(parameters) > _MOST_ELEMENTS:
                    continue
                candidate = {**chosen, kernel: parameters}
                with configs.forced({switch: {_SWITCH: switched}}):
                    time = _time(call, candidate)
                if time < best * (1 - _GAIN):
                    best, chosen, improved = time, candidate, True
    return best, chosen, variants


def _changes(choices: Mapping[str, tuple[int, ...]]) -> Iterable[dict[str, int]]:
    """What to change of a kernel's parameters, one try at a time."""
    if math.prod(map(len, choices.values())) <= _MOST_COMBINATIONS:
        return (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    return ({name: value} for name, values in choices.items() for value in values)


def _time(call: Callable[[], object], parameters: Mapping[str, Mapping[str, int]]) -> float:
    """Microseconds with these parameters; infinite where they do not fit the device."""
    with configs.forced(parameters):
        try:
            return timing.graph_microseconds(call)
        except torch.AcceleratorError:
            raise  # The device is lost to this process.
        except (TritonError, RuntimeError):
            return float("inf")


def _elements_a_thread(parameters: Mapping[str, int]) -> float:
    sizes = [value for name, value in parameters.items() if name.startswith("BLOCK_")]
    return math.prod(sizes) / (32 * parameters.get("num_warps", 1))


def _in_words(chosen: Chosen) -> str:
    return "; ".join(f"{kernel} {' '.join(f'{k}={v}' for k, v in given.items())}" for kernel, given in chosen.items())


def _routed(shape: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, routing weights and ids of a uniformly random router."""
    generator = torch.Generator(timing.DEVICE).manual_seed(tokens)
    logits = torch.randn(tokens, shape.n_experts, device=timing.DEVICE, generator=generator)
    weights, ids = gating.route(logits, top_k=shape.top_k, out_dtype=torch.bfloat16)
    x = torch.randn(tokens, shape.hidden, device=timing.DEVICE, generator=generator).to(torch.bfloat16)
    return x, weights, ids


def _bf16(shape: Shape) -> Format:
    def weight(rows: int, columns: int) -> torch.Tensor:
        size = (shape.n_experts, rows, columns)
        return torch.randn(size, dtype=torch.bfloat16, device=timing.DEVICE) * columns**-0.5

    w13, w2 = weight(2 * shape.inter, shape.hidden), weight(shape.hidden, shape.inter)
    return Format(
        experts.TUNABLE, shape.top_k, lambda tokens: partial(experts.experts, *_routed(shape, tokens), w13, w2)
    )


def _int4(shape: Shape) -> Format:
    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        nibbles = torch.randint(0, 256, (shape.n_experts, rows, columns // 2), dtype=torch.uint8, device=timing.DEVICE)
        groups = (shape.n_experts, rows, columns // shape.group)
        return nibbles, torch.rand(groups, device=timing.DEVICE).to(torch.bfloat16) * columns**-0.5

    w13, w2 = weight(2 * shape.inter, shape.hidden), weight(shape.hidden, shape.inter)
    launch = experts_int4.experts_int4
    return Format(experts_int4.TUNABLE, shape.top_k, lambda tokens: partial(launch, *_routed(shape, tokens), *w13, *w2))


FORMATS: dict[str, Callable[[Shape], Format]] = {"bf16": _bf16, "int4": _int4}
