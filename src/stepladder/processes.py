"""Forward processes `x_t = alpha_t x0 + sigma_t eps`: the one place that knows alpha, sigma and logSNR.

Timesteps run from 1000 (noise) to 0 (image), as diffusers counts them. Functions take and return tensors of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stepladder.errors import UserError
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

    def predict(self, x: Tensor, output: Tensor, timestep: Tensor) -> Prediction:
        """What a network's output at x, (B, …), and a scalar or (B,) timestep says of x0 and eps."""

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What networks of this process are trained to predict, from clean latents and noise: the scale of denoising losses."""

    def config(self) -> dict[str, Any]:
        """What `process_from` needs to build this process again, in diffusers' words."""


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

    def predict(self, x: Tensor, output: Tensor, timestep: Tensor) -> Prediction:
        """The output is a velocity."""
        return predict_from_velocity(x, output.to(x.dtype), self.sigma(timestep).to(x.dtype))

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The velocity: errors of the noise alone would vanish where there is nothing else."""
        return eps - x0

    def config(self) -> dict[str, Any]:
        """A flow has no betas."""
        return {"prediction_type": "flow_prediction"}


@dataclass(frozen=True)
class VariancePreservingProcess:
    """alpha = sqrt(abar), sigma = sqrt(1 - abar) (SDXL, PixArt-alpha), from betas over integer timesteps.

    Between integers logSNR is linear, so that `timestep` is its exact inverse. The table has no entry for t = 1000;
    its last one, t = 999, stands for it, as in the published few-step schedules.

    Args:
        beta_schedule: "linear" or "scaled_linear" (linear in the square roots), as diffusers names them.
        prediction_type: what the network puts out, "epsilon" or "v_prediction".
    """

    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("linear", "scaled_linear"):
            raise UserError(f"beta schedule {self.beta_schedule!r} is not supported; use linear or scaled_linear betas")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {self.prediction_type!r} is not supported; use epsilon or v_prediction")
        power = 1.0 if self.beta_schedule == "linear" else 0.5
        ends = (self.beta_start**power, self.beta_end**power)
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** (1 / power)
        abar = torch.cumprod(1 - betas, 0)
        object.__setattr__(self, "table", torch.log(abar) - torch.log1p(-abar))

    @classmethod
    def linear(cls) -> VariancePreservingProcess:
        """PixArt-alpha's betas."""
        return cls()

    @classmethod
    def scaled_linear(cls) -> VariancePreservingProcess:
        """SDXL's betas."""
        return cls(0.00085, 0.012, "scaled_linear")

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

    def predict(self, x: Tensor, output: Tensor, timestep: Tensor) -> Prediction:
        """The output is noise, or v = alpha eps - sigma x0."""
        alpha, sigma = self.alpha(timestep).to(x.dtype), self.sigma(timestep).to(x.dtype)
        if self.prediction_type == "epsilon":
            return predict_from_noise(x, output.to(x.dtype), alpha, sigma)
        a, s, v = spread(alpha, x), spread(sigma, x), output.to(x.dtype)
        return Prediction(a * x - s * v, a * v + s * x)

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The noise."""
        return eps

    def config(self) -> dict[str, Any]:
        """Betas and what the network puts out."""
        return {name: getattr(self, name) for name in VP_FIELDS}


VP_FIELDS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")


def process_from(config: Mapping[str, Any]) -> Process:
    """The process of a scheduler's configuration: a flow, or betas.

    Raises:
        UserError: betas or an output that no backbone was made for.
    """
    if config.get("prediction_type") == "flow_prediction":
        return FlowProcess()
    if config.get("rescale_betas_zero_snr"):
        raise UserError("betas rescaled to zero terminal SNR are not supported; use a scheduler without rescale_betas_zero_snr")
    return VariancePreservingProcess(**{name: config[name] for name in VP_FIELDS if name in config})


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to a scalar or a (B,) tensor so that it broadcasts over `like` of shape (B, …)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def predict_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor) -> Prediction:
    """A flow network outputs v = eps - x0: x0 = x - sigma v, eps = x + (1 - sigma) v."""
    s = spread(sigma, x)
    return Prediction(x - s * velocity, x + (1 - s) * velocity)


def predict_from_noise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """A variance-preserving network outputs eps: x0 = (x - sigma eps) / alpha."""
    return Prediction((x - spread(sigma, x) * noise) / spread(alpha, x), noise)
