"""The ascend target. Canonical ops run through their references here; its kernels plug in at this place."""

from moe_fx.lowering.targets import ReferenceTarget

TARGET = ReferenceTarget("ascend")
