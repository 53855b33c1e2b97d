"""Forward processes `x_t = alpha_t x0 + sigma_t eps`: the one place that knows alpha, sigma and logSNR.

Timesteps run from 1000 (noise) to 0 (image), as diffusers counts them. Functions take and return tensors of any shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stepladder.prediction import Prediction

TIMESTEPS = 1000.0


class Process(Protocol):
    """A forward process; `alpha(t)`, `sigma(t)` and `logsnr(t)` are elementwise, `timestep` inverts `logsnr`."""

    def logsnr(self, timestep: Tensor) -> Tensor:
        """log(alpha² / sigma²) at each timestep."""

    def timestep(self, logsnr: Tensor) -> Tensor:
        """The timestep at which `logsnr` is reached, clipped to the schedule's range."""

    def alpha(self, timestep: Tensor) -> Tensor:
        """Scale of the image."""

    def sigma(self, timestep: Tensor) -> Tensor:
        """Scale of the noise."""

    def logsnr_range(self) -> tuple[float, float]:
        """Lowest and highest logSNR the schedule reaches."""

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """The timestep as the network's embedding expects it."""


@dataclass(frozen=True)
class FlowProcess:
    """Rectified flow: alpha = 1 - sigma, sigma = t / 1000 (SD3, SD3.5, FLUX, Wan, Z-Image)."""

    def alpha(self, timestep: Tensor) -> Tensor:
        """Scale of the image, 1 - sigma."""
        return 1 - self.sigma(timestep)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Scale of the noise, t / 1000."""
        return timestep / TIMESTEPS

    def logsnr(self, timestep: Tensor) -> Tensor:
        """2 log((1 - sigma) / sigma): +inf at t = 0, -inf at t = 1000."""
        sigma = self.sigma(timestep)
        return 2 * (torch.log1p(-sigma) - torch.log(sigma))

    def timestep(self, logsnr: Tensor) -> Tensor:
        """RMD Eq. 1: sigma = 1 / (1 + exp(logSNR / 2))."""
        return TIMESTEPS * torch.sigmoid(-logsnr / 2)

    def logsnr_range(self) -> tuple[float, float]:
        """A flow reaches every logSNR."""
        return float("-inf"), float("inf")

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """Networks trained on a flow take t itself."""
        return timestep


@dataclass(frozen=True)
class VariancePreservingProcess:
    """alpha = sqrt(abar), sigma = sqrt(1 - abar) (SDXL, PixArt-alpha), from a table of abar over integer timesteps.

    Between integers logSNR is linear, so that `timestep` is its exact inverse. The table has no entry for t = 1000;
    its last one, t = 999, stands for it, as in the published few-step schedules.
    """

    alphas_cumprod: Tensor
    table: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod.double()
        object.__setattr__(self, "table", torch.log(abar) - torch.log1p(-abar))

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 2e-2, steps: int = 1000) -> VariancePreservingProcess:
        """Linear betas, as PixArt-alpha's."""
        return cls(torch.cumprod(1 - torch.linspace(start, end, steps, dtype=torch.float64), 0))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VariancePreservingProcess:
        """Betas linear in their square roots, as SDXL's."""
        return cls(torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2, 0))

    def logsnr(self, timestep: Tensor) -> Tensor:
        """log(abar / (1 - abar)), linear between integer timesteps."""
        t = timestep.double().clamp(0, len(self.table) - 1)
        table = self.table.to(t.device)
        below = t.floor().long().clamp(max=len(table) - 2)
        value = torch.lerp(table[below], table[below + 1], t - below)
        return value.to(timestep.dtype if timestep.is_floating_point() else torch.float32)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """RMD Eq. 1 for a variance-preserving process: the timestep at which abar has this logSNR."""
        rising = self.table.flip(0).to(logsnr.device)
        value = logsnr.double().clamp(rising[0], rising[-1])
        above = torch.searchsorted(rising, value).clamp(1, len(rising) - 1)
        share = (value - rising[above - 1]) / (rising[above] - rising[above - 1])
        return (len(rising) - 1 - (above - 1 + share)).to(logsnr.dtype)

    def alpha(self, timestep: Tensor) -> Tensor:
        """Scale of the image, sqrt(abar)."""
        return torch.sigmoid(self.logsnr(timestep)).sqrt()

    def sigma(self, timestep: Tensor) -> Tensor:
        """Scale of the noise, sqrt(1 - abar)."""
        return torch.sigmoid(-self.logsnr(timestep)).sqrt()

    def logsnr_range(self) -> tuple[float, float]:
        """The ends of the table."""
        return self.table[-1].item(), self.table[0].item()

    def network_timestep(self, timestep: Tensor) -> Tensor:
        """Networks were trained on indices up to 999."""
        return timestep.clamp(max=len(self.table) - 1)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to a scalar or a (B,) tensor so that it broadcasts over `like` of shape (B, …)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def predict_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Prediction:
    """A flow network outputs v = eps - x0: x0 = x - sigma v, eps = x + (1 - sigma) v (notes.md section 1)."""
    s = spread(sigma, x)
    return Prediction(x - s * velocity, x + (1 - s) * velocity)


def predict_from_noise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """A variance-preserving network outputs eps: x0 = (x - sigma eps) / alpha."""
    return Prediction((x - spread(sigma, x) * noise) / spread(alpha, x), noise)
