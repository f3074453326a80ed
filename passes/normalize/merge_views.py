"""Two reshapes in a row become one.

Unfused::

    y = x.view(a).view(b)

Fused::

    y = x.view(b)

Only when nothing else reads the first view: matchers then see tokens flattened in one step, however many the model
took.
"""

from __future__ import annotations

from moe_fx.passes.core import Level, MatchContext, Pass, Stage
from moe_fx.passes.graph import aten, is_op


class MergeViewsPass(Pass):
    """Consecutive views of one tensor are merged."""

    name = "merge_views"
    stage = Stage.NORMALIZE
    level = Level.BITWISE

    def run(self, ctx: MatchContext) -> None:
        for node in ctx.graph.find_nodes(op="call_function", target=aten.view.default):
            first = node.args[0]
            # A view of a view is a view of the source; a reshape may have copied, and must stay where it is.
            if is_op(first, aten.view.default) and len(first.users) == 1:
                node.update_arg(0, first.args[0])
        ctx.finish_pass()
