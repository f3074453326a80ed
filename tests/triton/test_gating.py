"""The gating kernel against the canonical ``route``, and against a stable selection where choices are equal."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, assert_within, gpu_only, on_device

from moe_fx.lowering.cuda import configs, gating
from moe_fx.lowering.ops import CANONICAL_OPS

ROUTE = CANONICAL_OPS["route"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Pair = tuple[torch.Tensor, torch.Tensor]


class FloatForm:
    """The kernel in the form that Ascend gets, for the launcher of CUDA."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            source = "choice" if constants["SOURCE"] == "value" else constants["SOURCE"]
            KERNEL[grid](*args, **{**constants, "NARROW": False, "ASCEND": True, "SOURCE": source})

        return launch


KERNEL = gating.gating_kernel


@pytest.fixture(params=["keys", "floats"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on both ways to select; the floats only where they are interpreted, since CUDA does not use them."""
    if request.param == "floats":
        if DEVICE != "cpu":
            pytest.skip("CUDA selects by keys")
        monkeypatch.setattr(gating, "gating_kernel", FloatForm())
    return str(request.param)


def untied(logits: torch.Tensor) -> torch.Tensor:
    """Logits of that shape and dtype of which no two in a row are equal, exact in every dtype."""
    steps = torch.rand(logits.shape).argsort(dim=-1) - logits.shape[-1] // 2
    return (steps / 32).to(logits.dtype)


def by_id(result: Pair) -> Pair:
    """A token's experts in the order of their ids."""
    ids, order = result[1].sort(dim=-1)
    return result[0].gather(-1, order), ids


def assert_same(given: Pair, wanted: Pair, dtype: torch.dtype) -> None:
    """Equal sets of experts, and weights within the op's tolerance for ``dtype``."""
    (weights, ids), (wanted_weights, wanted_ids) = by_id(given), by_id(wanted)
    assert torch.equal(ids, wanted_ids)
    assert_within("route", weights, wanted_weights, dtype)


def stable_route(logits: torch.Tensor, bias: torch.Tensor | None = None, **a: Any) -> Pair:
    """``route`` a token at a time in double precision, equal choices to the lowest id everywhere."""
    scores_of = {
        "softmax": lambda z: torch.softmax(z, -1),
        "sigmoid": torch.sigmoid,
        "softplus": torch.nn.functional.softplus,
        "sqrtsoftplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
        "tanh": torch.tanh,
        "identity": lambda z: z,
    }[a.get("score", "softmax")]
    weights, ids = [], []
    for z in logits.double().flatten(0, -2):
        before = a.get("order", "before") == "before"
        base = scores_of(z) if before else z
        choice = base if bias is None else base + bias.double()
        n_group = a.get("n_group", 1)
        if n_group > 1:
            groups = choice.view(n_group, -1)
            best_two = groups.sort(dim=-1, descending=True).values[:, :2]
            group_scores = best_two[:, 0] if a.get("group_score", "max") == "max" else best_two.sum(-1)
            kept = group_scores.sort(descending=True, stable=True).indices[: a["topk_group"]]
            limited = torch.full_like(groups, -math.inf if a.get("group_fill", "-inf") == "-inf" else 0.0)
            limited[kept] = groups[kept]
            choice = limited.flatten()
        chosen = choice.sort(descending=True, stable=True).indices[: a["top_k"]]
        values = a.get("weight_source") == "choice" or (bias is None and n_group == 1)
        w = (choice if values else base)[chosen]
        if not before:
            w = scores_of(w)
        if a.get("renormalize", "none") == "eps":
            w = w / (w.sum() + a.get("eps", 0.0))
        elif a.get("renormalize", "none") == "clamp":
            w = w / w.sum().clamp(min=a.get("eps", 0.0))
        weights.append(w * a.get("scale", 1.0))
        ids.append(chosen)
    shape = (*logits.shape[:-1], a["top_k"])
    return torch.stack(weights).float().view(shape), torch.stack(ids).int().view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted({s.name.split("-")[0] for s in ROUTE.samples(DTYPES[0], torch.Generator())}))
def test_samples(name: str, dtype: torch.dtype) -> None:
    for sample in ROUTE.samples(dtype, torch.Generator().manual_seed(0)):
        if sample.name.split("-")[0] != name:
            continue
        logits, bias = (None if each is None else on_device(each) for each in sample.args)
        # More tokens than programs, and than fill a block.
        logits = on_device(untied(logits[:14]))
        assert gating.route_refusal(logits, bias, **sample.kwargs) is None
        given = gating.route(logits, bias, **sample.kwargs)
        assert_same(given, ROUTE.reference(logits, bias, **sample.kwargs), dtype)


def a_case(rng: random.Random) -> tuple[int, dict[str, Any], bool]:
    """A number of experts, attributes of ``route``, and whether there is a bias."""
    n_group, size = rng.choice([(1, 8), (1, 20), (1, 33), (2, 8), (4, 4), (3, 5), (8, 3), (5, 16)])
    biased = rng.random() < 0.5
    topk_group = rng.randint(1, n_group)
    attributes: dict[str, Any] = dict(
        score=rng.choice(["softmax", "sigmoid", "sqrtsoftplus", "softplus", "tanh", "identity"]),
        order=rng.choice(["before", "before", "after"]),
        n_group=n_group,
        topk_group=topk_group,
        group_score=rng.choice(["max", "top2sum"]),
        group_fill=rng.choice(["-inf", "zero"]),
        # More than there are in the best groups would make the choice one of fill values.
        top_k=rng.randint(1, min(8, topk_group * size)),
        weight_source=rng.choice(["scores", "choice"]),
        scale=rng.choice([1.0, 2.5]),
    )
    if attributes["score"] not in ("tanh", "identity"):  # whose sum may be near zero
        attributes |= dict(renormalize=rng.choice(["none", "eps", "clamp"]), eps=rng.choice([0.0, 1e-20, 0.5, 4.0]))
    return n_group * size, attributes, biased


@pytest.mark.parametrize("seed", range(48))
def test_equal_choices_go_to_the_lowest_id(seed: int, form: str) -> None:
    n_experts, attributes, biased = a_case(random.Random(seed))
    # Few different values: ties within and between groups.
    logits = torch.randint(-3, 4, (3, n_experts)).to(DTYPES[seed % 3]) / 2
    bias = torch.randint(0, 3, (n_experts,)) / 8 if biased else None
    logits, bias = on_device(logits), None if bias is None else on_device(bias)
    weights, ids = gating.route(logits, bias, **attributes)
    wanted_weights, wanted_ids = stable_route(logits, bias, **attributes)
    assert torch.equal(ids, wanted_ids)
    assert_within("route", weights, wanted_weights, torch.float32)


@pytest.mark.parametrize("fill", ["-inf", "zero"])
@pytest.mark.parametrize("source", ["scores", "choice"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_experts_than_the_best_groups_have(dtype: torch.dtype, biased: bool, source: str, fill: str) -> None:
    logits = on_device(untied(torch.empty(5, 12)).to(dtype))
    bias = on_device(torch.rand(12)) if biased else None
    kwargs = dict(n_group=4, topk_group=1, group_fill=fill, weight_source=source, score="sigmoid")
    weights, ids = gating.route(logits, bias, top_k=5, **kwargs)
    wanted_weights, wanted_ids = ROUTE.reference(logits, bias, top_k=5, **kwargs)
    assert all(len(set(row)) == 5 for row in ids.tolist())
    # Beyond the best group all fill values are equal: torch may choose any.
    assert torch.equal(ids[:, :3], wanted_ids[:, :3])
    assert_within("route", weights[:, :3], wanted_weights[:, :3], torch.float32)
    if source == "choice":
        assert_within("route", weights, wanted_weights, torch.float32)
    else:
        assert_within("route", weights, torch.sigmoid(logits.float()).gather(1, ids.long()), torch.float32)


@pytest.mark.parametrize(
    ("n_experts", "top_k"), [(1, 1), (2, 2), (3, 3), (60, 4), (100, 10), (160, 6), (384, 8), (512, 32)]
)
def test_any_number_of_experts(n_experts: int, top_k: int, form: str) -> None:
    logits = on_device(untied(torch.empty(3, n_experts)))
    bias = on_device(torch.rand(n_experts) * 3)
    for kwargs in (dict(renormalize="eps"), dict(score="sigmoid", scale=2.0, out_dtype=torch.bfloat16)):
        for given_bias in (None, bias):
            wanted = ROUTE.reference(logits, given_bias, top_k=top_k, **kwargs)
            given = gating.route(logits, given_bias, top_k=top_k, **kwargs)
            assert torch.equal(given[1], wanted[1])
            assert_same(given, wanted, torch.float32 if "renormalize" in kwargs else torch.bfloat16)


@pytest.mark.parametrize("block_t", [1, 4])
@pytest.mark.parametrize(("n_experts", "top_k"), [(64, 8), (100, 10), (128, 8), (200, 1), (512, 32)])
def test_bf16_logits_of_many_experts(n_experts: int, top_k: int, block_t: int, form: str) -> None:
    """Keys with ids in them, from 65 experts on in columns: ties, zeros of either sign, fewer finite logits than k."""
    rng = random.Random(n_experts)
    rows = [rng.choices(values, k=n_experts) for values in ([0.5, 1.0, -3.0], [0.0, -0.0, -1.0], [-math.inf], [-0.0])]
    rows += [[math.nan if n % 7 == 3 else float(n % 5) for n in range(n_experts)], [-math.inf] * n_experts]
    rows[-1][-1] = -2.0
    logits = torch.tensor(rows).bfloat16()
    wanted = logits.nan_to_num(nan=math.inf, neginf=-math.inf).sort(descending=True, stable=True).indices[:, :top_k]
    with configs.forced({"gating": {"BLOCK_T": block_t, "WAVES": 1, "num_warps": block_t}}):
        weights, ids = gating.route(on_device(logits), top_k=top_k, score="identity")
    assert torch.equal(ids.cpu().long(), wanted)
    assert_within("route", weights.cpu(), logits.gather(1, wanted).float(), torch.float32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softplus", "tanh", "identity"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_scores_of_far_logits(score: str, order: str) -> None:
    logits = torch.tensor([[-90.0, -30.0, -9.0, -1.0, -1e-3, 0.0, 1e-4, 0.3, 0.7, 1.0, 5.0, 19.0, 21.0, 60.0, 200.0]])
    logits = on_device(logits)
    kwargs = dict(top_k=15, score=score, order=order)
    # On fewer digits than the tolerance asks for, a score of 1e-14 must still not be 0.
    (weights, ids), (wanted, _) = gating.route(logits, **kwargs), stable_route(logits, **kwargs)
    assert ids.tolist() == [list(range(14, -1, -1))]
    torch.testing.assert_close(weights, wanted, atol=1e-30, rtol=2e-5)


@pytest.mark.parametrize("score_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(score="sigmoid", renormalize="eps", eps=1e-20, scale=2.5),
        dict(score="sqrtsoftplus", renormalize="clamp", eps=1e-12),
        dict(score="tanh", order="after"),
        dict(order="after", n_group=4, topk_group=2, group_score="top2sum"),
        dict(score="sigmoid", weight_source="choice", out_dtype=torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16], ids=str)
def test_scores_in_the_models_dtype(
    kwargs: dict[str, Any], score_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    logits = on_device(untied(torch.empty(3, 32)))
    bias = None if bias_dtype is None else on_device((torch.randperm(32) * 4.0).to(bias_dtype))
    given = gating.route(logits, bias, top_k=4, score_dtype=score_dtype, **kwargs)
    wanted = ROUTE.reference(logits, bias, top_k=4, score_dtype=score_dtype, **kwargs)
    assert_same(given, wanted, score_dtype)
    if score_dtype == torch.float16:
        # Torch's very values, but for scores that lie between two of them.
        assert (given[0] == wanted[0]).double().mean() > 0.8


MODES: dict[str, dict[str, Any]] = {
    "softmax": dict(renormalize="eps"),
    "after": dict(order="after"),
    "groups": dict(n_group=4, topk_group=2),
    "top2sum": dict(n_group=4, topk_group=2, group_score="top2sum", score="sigmoid"),
    "identity": dict(score="identity", n_group=3, topk_group=2, group_fill="zero"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_of_broken_logits_are_distinct_and_in_range(dtype: torch.dtype, mode: str, biased: bool, form: str) -> None:
    nan, inf = math.nan, math.inf
    rows = [[nan] * 24, [inf] * 24, [-inf] * 24, [0.0] * 24, [-0.0, 0.0] * 12, [nan, inf, -inf, 1.0] * 6]
    rows.append([-nan] + [2.0] * 23)
    logits = on_device(torch.tensor(rows).to(dtype))
    bias = on_device(torch.zeros(24)) if biased else None
    _, ids = gating.route(logits, bias, top_k=7, **MODES[mode])
    for row in ids.tolist():
        assert len(set(row)) == 7 and min(row) >= 0 and max(row) < 24


@pytest.mark.parametrize("n_group", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_logits_break_the_weights_that_they_break_in_torch(dtype: torch.dtype, n_group: int, form: str) -> None:
    """Also where only the chosen experts' exponentials are summed."""
    nan, inf, low = math.nan, math.inf, -math.inf
    logits = torch.randn(7, 16)
    logits[0, 5], logits[1, 5], logits[2, 5] = nan, inf, low
    logits[3, :14], logits[4], logits[5] = low, low, inf
    logits[6, :8], logits[6, 11] = low, nan
    logits = on_device(logits.to(dtype))
    kwargs = dict(top_k=3, n_group=n_group, topk_group=(n_group + 1) // 2)
    for renormalize in ("eps", "none"):
        weights, _ = gating.route(logits, **kwargs, renormalize=renormalize)
        wanted, _ = ROUTE.reference(logits, **kwargs, renormalize=renormalize)
        assert_within("route", weights, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign_are_equal(dtype: torch.dtype, form: str) -> None:
    logits = on_device(torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0]]).to(dtype))
    assert gating.route(logits, top_k=3)[1].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_above_everything_as_in_torch(dtype: torch.dtype, order: str, form: str) -> None:
    logits = untied(torch.empty(4, 16, dtype=dtype))
    logits[:, 9] = torch.tensor([math.nan, math.nan, -math.nan, -math.nan])
    if form == "keys":
        logits[1, 3] = math.inf
    weights, ids = gating.route(on_device(logits), top_k=3, score="sigmoid", order=order)
    wanted, wanted_ids = ROUTE.reference(on_device(logits), top_k=3, score="sigmoid", order=order)
    assert torch.equal(ids, wanted_ids)
    assert_within("route", weights, wanted, torch.float32)


@pytest.mark.parametrize("num_valid", [0, 1, 6, 7, 9])
@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64], ids=str)
def test_padding_tokens(num_valid: int, int_dtype: torch.dtype, form: str) -> None:
    logits = on_device(untied(torch.empty(7, 16, dtype=torch.bfloat16)))
    valid = on_device(torch.tensor(num_valid, dtype=int_dtype))
    for block_t in (1, 4):
        with configs.forced({"gating": {"BLOCK_T": block_t, "WAVES": 1, "num_warps": 4}}):
            weights, ids = gating.route(logits, top_k=3, renormalize="eps", num_valid=valid)
        wanted, wanted_ids = ROUTE.reference(logits, top_k=3, renormalize="eps")
        assert torch.equal(ids[:num_valid], wanted_ids[:num_valid])
        assert_within("route", weights[:num_valid], wanted[:num_valid], torch.float32)
        assert (ids[num_valid:] == -1).all() and (weights[num_valid:] == 0).all()


def test_any_strides_and_leading_shape() -> None:
    wide = on_device((torch.randperm(480) / 64).view(2, 3, 4, 20))
    bias = on_device(torch.rand(20, 2))[:, 1]
    for logits in (wide, wide[..., 4:16], wide[..., ::2], wide.transpose(0, 2), wide[0, 0].t()[:, :4], wide[1, 1, 1]):
        for given_bias in (None, bias[: logits.shape[-1]]):
            kwargs = dict(top_k=3, score="sigmoid", renormalize="eps")
            given = gating.route(logits, given_bias, **kwargs)
            assert_same(given, ROUTE.reference(logits, given_bias, **kwargs), torch.float32)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    weights, ids = gating.route(on_device(torch.empty(shape)), top_k=3, out_dtype=torch.bfloat16)
    assert weights.shape == ids.shape == (*shape[:-1], 3)
    assert (weights.dtype, ids.dtype) == (torch.bfloat16, torch.int32)


@pytest.mark.parametrize("block_t", [2, 8])
def test_blocks_of_tokens(block_t: int, form: str) -> None:
    logits = on_device(untied(torch.empty(2 * block_t + 1, 40)))
    kwargs = dict(top_k=6, n_group=8, topk_group=3, score="sigmoid", group_score="top2sum")
    bias = on_device(torch.rand(40))
    with configs.forced({"gating": {"BLOCK_T": block_t, "WAVES": 1, "num_warps": 4}}):
        assert_same(gating.route(logits, bias, **kwargs), ROUTE.reference(logits, bias, **kwargs), torch.float32)


@gpu_only
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("block_t", [1, 2, 4, 8])
@pytest.mark.parametrize(("n_experts", "n_group"), [(40, 8), (15, 3), (128, 1), (256, 8), (160, 8), (512, 1)])
def test_any_launch_parameters(n_experts: int, n_group: int, block_t: int, num_warps: int) -> None:
    """A result must not depend on how tokens and places are spread over threads."""
    logits = on_device(untied(torch.empty(3 * block_t + 1, n_experts)))
    bias = on_device(torch.rand(n_experts))
    kwargs = dict(top_k=6, n_group=n_group, topk_group=(n_group + 1) // 2, score="sigmoid", group_score="top2sum")
    wanted = ROUTE.reference(logits, bias, **kwargs)
    with configs.forced({"gating": {"BLOCK_T": block_t, "WAVES": 1, "num_warps": num_warps}}):
        for _ in range(5):
            assert_same(gating.route(logits, bias, **kwargs), wanted, torch.float32)


@gpu_only
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("block_t", [1, 2, 4, 8])
@pytest.mark.parametrize("n_experts", [40, 100, 128, 256, 512])
def test_any_launch_parameters_for_bf16_logits(n_experts: int, block_t: int, num_warps: int) -> None:
    """As above, for keys with ids in them."""
    logits = torch.randint(-40, 41, (3 * block_t + 1, n_experts)).bfloat16() / 8
    wanted = logits.sort(descending=True, stable=True).indices[:, :6].int()
    with configs.forced({"gating": {"BLOCK_T": block_t, "WAVES": 1, "num_warps": num_warps}}):
        for _ in range(5):
            weights, ids = gating.route(on_device(logits), top_k=6, score="identity")
            assert torch.equal(ids.cpu(), wanted)
            assert torch.equal(weights.cpu(), logits.gather(1, wanted.long()).float())


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_many_tokens(tokens: int, dtype: torch.dtype) -> None:
    logits = on_device(untied(torch.empty(tokens, 256, dtype=dtype)))
    for kwargs in (dict(renormalize="eps"), dict(score="sigmoid", n_group=8, topk_group=4)):
        given, wanted = gating.route(logits, top_k=8, **kwargs), ROUTE.reference(logits, top_k=8, **kwargs)
        assert_same(given, wanted, torch.float32)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (dict(top_k=33), "k = 33 is more than 32"),
        (dict(top_k=65), "k = 65 is more than 32"),
        (dict(top_k=0), "k = 0 is not between 1 and E = 64"),
        (dict(top_k=2, score="gelu"), "score = 'gelu' is none of softmax"),
        (dict(top_k=2, score_dtype=torch.float64), "torch.float64 is none of"),
        (dict(top_k=2, out_dtype=torch.float64), "torch.float64 is none of"),
        (dict(top_k=2, n_group=3), "64 experts do not divide into 3 groups"),
        (dict(top_k=2, n_group=4, topk_group=5), "topk_group = 5 is not between 1 and n_group = 4"),
        (dict(top_k=2, n_group=64, group_score="top2sum"), "a group of one expert has no two best"),
        (dict(top_k=2, bias=torch.zeros(1)), "the bias is of shape"),
        (dict(top_k=2, bias=torch.zeros(64, dtype=torch.float64)), "torch.float64 is none of"),
    ],
    ids=str,
)
def test_refusals(kwargs: dict[str, Any], reason: str) -> None:
    assert reason in str(gating.route_refusal(torch.empty(5, 64), **kwargs))


def test_takes_up_to_512_experts() -> None:
    assert gating.route_refusal(torch.empty(5, 512), top_k=8) is None
    assert gating.route_refusal(torch.empty(5, 513), top_k=8) == "E = 513 is more than 512"
