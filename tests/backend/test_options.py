"""Options: defaults, environment, precedence, and one teaching error for every kind of bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from moe_fx.errors import OptionError
from moe_fx.options import Options, table
from moe_fx.passes import PIPELINE, Pass


class Nothing(Pass):
    """A pass that does nothing."""

    name = "nothing"

    def run(self, ctx):
        pass


def test_defaults_are_the_documented_ones():
    assert Options.from_user({}, {}) == Options()
    rows = {row["name"]: row for row in table()}
    assert set(rows) == {f.name for f in dataclasses.fields(Options)}
    assert rows["target"]["choices"] == "auto, cpu, cuda, ascend"
    assert all(row["summary"] for row in rows.values())


def test_environment_and_precedence():
    environ = {
        "MOE_FX_DOWNSTREAM": "eager",
        "MOE_FX_STRICT": "on",
        "MOE_FX_PASSES": "swiglu=off,-rms_norm,router",
        "MOE_FX_LEVEL": "bitwise",
    }
    options = Options.from_user({"level": "tolerance"}, environ)
    assert options.downstream == "eager"
    assert options.strict is True
    assert options.passes == {"swiglu": False, "rms_norm": False, "router": True}
    assert options.level == "tolerance", "torch.compile(options=...) goes before the environment"


BAD = {
    "unknown name": ({"tarjet": "cpu"}, {}, "unknown option 'tarjet'.*valid options: target, downstream"),
    "unknown value": ({"target": "tpu"}, {}, "option 'target' is 'tpu'; valid values: auto, cpu, cuda, ascend"),
    "downstream": ({"downstream": "tvm"}, {}, "valid values: auto, inductor, torchair, eager, aot_eager"),
    "level": ({"level": "fast"}, {}, "valid values: bitwise, tolerance"),
    "strict": ({"strict": "yes"}, {}, "option 'strict' is 'yes'; give True or False"),
    "check": ({"check": 1}, {}, "give True or False"),
    "unknown pass": (
        {"passes": {"rooter": True}},
        {},
        "unknown pass 'rooter'; valid passes: drop_noops, merge_views, router",
    ),
    "pass switch": ({"passes": {"router": "maybe"}}, {}, "sets pass 'router' to 'maybe'"),
    "passes kind": ({"passes": 3}, {}, "give a mapping from pass name"),
    "dump_dir": ({"dump_dir": 3}, {}, "give a directory path"),
    "check_dir": ({"check_dir": ""}, {}, "give a directory path"),
    "report": ({"report": 3}, {}, "give a function of one GraphReport"),
    "extra pass": ({"extra_passes": [3]}, {}, "no moe_fx.Pass instance"),
    "extra pass class": ({"extra_passes": [Nothing]}, {}, "instantiate the class"),
    "extra pass kind": ({"extra_passes": 3}, {}, "give a list of moe_fx.Pass instances"),
    "extra pass twice": ({"extra_passes": [Nothing(), Nothing()]}, {}, "a name that is taken"),
    "ascend_combine": ({"ascend_combine": "sum"}, {}, "valid values: finalize_routing, token_unpermute"),
    "ascend_weights": ({}, {"MOE_FX_ASCEND_WEIGHTS": "nz"}, "valid values: prepared, as_is"),
    "ascend_nz": ({"ascend_nz": 1}, {}, "give True or False"),
    "ascend_prefetch": ({"ascend_prefetch": "all"}, {}, "give True or False"),
    "ascend_shared_stream": ({"ascend_shared_stream": "all"}, {}, "give True or False"),
    "ascend_prefetch_mib": ({"ascend_prefetch_mib": 0}, {}, "give a whole number of MiB above zero"),
    "cache": ({"cache": "yes"}, {}, "give True or False"),
    "cache_dir": ({"cache_dir": 3}, {}, "give a directory path"),
    "cache_max_mib": ({"cache_max_mib": 0}, {}, "give a whole number of MiB above zero"),
    "cache_max_mib kind": ({"cache_max_mib": True}, {}, "give a whole number of MiB above zero"),
    "environment size": ({}, {"MOE_FX_CACHE_MAX_MIB": "1.5"}, "MOE_FX_CACHE_MAX_MIB is '1.5'; give a whole number"),
    "downstream_options": ({"downstream_options": 3}, {}, "give a mapping of the downstream compiler's options"),
    "environment value": ({}, {"MOE_FX_TARGET": "gpu"}, "MOE_FX_TARGET is 'gpu'; valid values"),
    "environment switch": ({}, {"MOE_FX_STRICT": "perhaps"}, "MOE_FX_STRICT is 'perhaps'; give True or False"),
    "environment pass": ({}, {"MOE_FX_PASSES": "router=maybe"}, "MOE_FX_PASSES sets pass 'router' to 'maybe'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case):
    given, environ, message = BAD[case]
    with pytest.raises(OptionError, match=message):
        Options.from_user(given, environ)


def test_every_option_has_a_bad_input_test_or_choices():
    covered = " ".join(str(given) + str(environ) for given, environ, _ in BAD.values()).lower()
    assert [f.name for f in dataclasses.fields(Options) if f.name not in covered] == []


@pytest.mark.parametrize(
    "options, mode, message",
    [
        ({"downstream": "eager", "nonsense": 1}, None, "unknown option 'nonsense'"),
        ({"downstream": "eager"}, "max-autotune", "mode='max-autotune' is for downstream='inductor'"),
        ({"downstream_options": {"no_such_knob": 1}}, None, "Inductor's config does not have"),
        ({"downstream": "torchair"}, None, "needs torch_npu"),
    ],
)
def test_bad_options_reach_the_user_through_torch_compile(options, mode, message):
    kwargs = {} if mode is None else {"mode": mode}
    if mode is not None:
        # torch.compile takes mode or options, not both: options then come from the environment.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_FX_DOWNSTREAM", "eager")
            compiled = torch.compile(nn.Linear(2, 2), backend="moe_ascend", **kwargs)
            with pytest.raises(Exception, match=message), torch.no_grad():
                compiled(torch.ones(1, 2))
        return
    compiled = torch.compile(nn.Linear(2, 2), backend="moe_ascend", options=options)
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(torch.ones(1, 2))


def test_switching_a_pass_off_switches_off_what_needs_it():
    from moe_fx.pipeline import active_passes

    names = [p.name for p in active_passes(Options(passes={"rms_norm": False}))]
    assert "rms_norm" not in names and "add_rms_norm" not in names and "qk_norm_rope" not in names
    assert [p.name for p in active_passes(Options())] == [p.name for p in PIPELINE if p.enabled_by_default]
