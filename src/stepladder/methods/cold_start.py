"""DMDR's cold start: how far the real score leans towards the fake one, and how renoise times are biased to high noise."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class ColdStart(BaseModel):
    """DMDR section 3.3. Dynamic parts fall linearly to nothing over `updates`; static ones stay as they begin, for ever.

    DynaDG: the fake score's adapter, scaled by `real_scale`, is added to the real score too. DynaRS: of an interval of
    renoise times, u^(1 / renoise_bias) is drawn instead of u, uniform in [0, 1]; a bias of 1 is uniform.
    """

    model_config = ConfigDict(extra="forbid")

    updates: int = Field(1000, ge=1, description="length; terms of reinforcement learning begin after it")
    real_scale: float = Field(0.5, ge=0, lt=1, description="DynaDG: scale of the fake score's adapter in the real score; 0 is off")
    real_scale_dynamic: bool = Field(True, description="whether it falls to 0; needs roles.mode lora in any case")
    renoise_bias: float = Field(2.0, ge=1, description="DynaRS: density of high noise; 1 is off")
    renoise_bias_dynamic: bool = Field(True, description="whether it falls to 1")

    def left(self, update: int) -> float:
        """Share of the cold start that is still to come."""
        return max(0.0, 1 - update / self.updates)

    def real_scale_at(self, update: int) -> float:
        """DynaDG's scale at an update."""
        # DMDR section 3.3
        return self.real_scale * (self.left(update) if self.real_scale_dynamic else 1.0)

    def renoise_bias_at(self, update: int) -> float:
        """DynaRS's bias at an update."""
        # DMDR section 3.3
        return 1 + (self.renoise_bias - 1) * (self.left(update) if self.renoise_bias_dynamic else 1.0)


def biased(bias: float, batch: int, generator: torch.Generator) -> Tensor:
    """(B,) numbers in [0, 1] with density bias u^(bias - 1): uniform for 1, towards 1 beyond."""
    return torch.rand(batch, generator=generator) ** (1 / bias)
