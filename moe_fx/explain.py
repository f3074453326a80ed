"""``moe_fx.explain``: what was fused in a model, what was not, and why."""
from __future__ import annotations
from dataclasses import dataclass
from moe_fx.pipeline import GraphReport
@dataclass
class Explanation:
    graphs: list
    def to_text(self): return ""
