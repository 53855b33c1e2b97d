"""What every network call returns, whatever the network was trained to output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """A network's view of a noisy state `x_t = alpha x0 + sigma eps`; both fields have the state's shape."""

    x0: Tensor
    eps: Tensor
