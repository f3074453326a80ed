"""The pass collection: every pass that moe-fx runs, in order, each with its switch.

``PIPELINE`` is the one list. A pass is switched with ``options={"passes": {"name": False}}``; passes from outside are
given per compilation with ``options={"extra_passes": [...]}`` and run after the match passes.
"""

from __future__ import annotations

from moe_fx.passes.core import Level, MatchContext, Miss, Pass, Site, Stage
from moe_fx.passes.match.attention import AttentionPass
from moe_fx.passes.match.experts import ExpertsPass
from moe_fx.passes.match.experts_dense import ExpertsDensePass
from moe_fx.passes.match.experts_loop import ExpertsLoopPass
from moe_fx.passes.match.norms import AddRmsNormPass, RmsNormPass
from moe_fx.passes.match.qk_norm_rope import QkNormRopePass
from moe_fx.passes.match.router import RouterPass
from moe_fx.passes.match.swiglu import SwigluPass
from moe_fx.passes.normalize.merge_views import MergeViewsPass
from moe_fx.passes.normalize.noops import DropNoopsPass

PIPELINE: tuple[type[Pass], ...] = (
    DropNoopsPass,
    MergeViewsPass,
    RouterPass,
    ExpertsPass,
    ExpertsDensePass,
    ExpertsLoopPass,
    RmsNormPass,
    QkNormRopePass,
    AddRmsNormPass,
    SwigluPass,
    AttentionPass,
)


def table() -> list[dict[str, str]]:
    """The pass list for documentation and ``moe-fx passes``: name, stage, level, default, summary."""
    return [
        {
            "name": cls.name,
            "stage": cls.stage.value,
            "level": cls.level.value,
            "default": "on" if cls.enabled_by_default else "off",
            "requires": ", ".join(cls.requires),
            "summary": cls().summary,
        }
        for cls in PIPELINE
    ]


__all__ = ["PIPELINE", "Level", "MatchContext", "Miss", "Pass", "Site", "Stage", "table"]
