"""How much memory a model holds, before, after and at most while it is prepared."""

from __future__ import annotations

import torch
from torch import nn

from moe_fx.preparation.install import ATTRIBUTE, is_prepared


class Ledger:
    """Follows a model's size while its blocks are worked on.

    Attributes:
        before: bytes at the start.
        peak: the most that there was so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.before = self.peak = bytes_held(model)

    def now(self) -> int:
        """Bytes at present."""
        return bytes_held(self._model)

    def saw(self, extra: int) -> None:
        """Note that ``extra`` bytes are, or were just now, held on top of the model."""
        self.peak = max(self.peak, self.now() + extra)


def bytes_held(model: nn.Module) -> int:
    """Size of all distinct storages behind parameters, buffers and stacked weights, in memory of some device."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_prepared(module):
            tensors += getattr(module, ATTRIBUTE).stacks()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())
