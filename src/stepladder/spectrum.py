"""How much of a latent's spectrum noise hides, and so how small a rung may be (SwD section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepladder.processes import Process

MASKED = 0.1
# no published ladder starts below a quarter of the full side (SwD appendix D)
LEAST = 0.25


@dataclass(frozen=True)
class Spectrum:
    """Mean power of clean latents at `frequencies`, in cycles a sample (0.5 is the finest) (SwD section 3).

    White noise of variance 1 has power 1 at all of them.
    """

    frequencies: tuple[float, ...]
    power: tuple[float, ...]

    def noised(self, process: Process, timestep: float) -> list[float]:
        """Expected power at a timestep: alpha² P + sigma², image and noise being independent."""
        t = torch.tensor(timestep, dtype=torch.float64)
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        return [alpha**2 * power + sigma**2 for power in self.power]

    def safe_scale(self, process: Process, timestep: float, masked: float = MASKED) -> float:
        """The smallest share of the full side that loses nothing at a timestep.

        A side of share s holds frequencies below s / 2. Those above must be masked: the image's power there is at most
        `masked` times the noise's.
        """
        t = torch.tensor(timestep, dtype=torch.float64)
        # at most e^{logSNR} of the noise's power is the image's, times P
        snr = math.exp(min(process.logsnr(t).item(), 60.0))
        seen = [frequency for frequency, power in zip(self.frequencies, self.power, strict=True) if snr * power > masked]
        if not seen:
            return 0.0
        place = self.frequencies.index(seen[-1]) + 1
        # the bin after the last one seen begins half-way between their centres
        end = (seen[-1] + self.frequencies[place]) / 2 if place < len(self.frequencies) else 0.5
        return min(1.0, 2 * end)


def radial_spectrum(latents: Tensor) -> Spectrum:
    """Radially averaged power spectral density over height and width of latents (B, C, H, W) or (B, C, T, H, W).

    The transform is orthonormal: the mean over all frequencies is the mean square of the latents. Frequencies are binned
    by their distance from zero in steps of one cycle over the shorter side; corners beyond 0.5 are left out.
    """
    power = torch.fft.fft2(latents.double(), norm="ortho").abs().square().flatten(0, -3).mean(0)
    height, width = power.shape
    radius = torch.sqrt(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None] ** 2 + torch.fft.fftfreq(width, dtype=torch.float64) ** 2
    )
    side = min(height, width)
    return _binned(radius.flatten() * side, power.flatten(), side)


def temporal_spectrum(latents: Tensor) -> Spectrum:
    """Power spectral density over the frames of video latents (B, C, T, H, W)."""
    frames = latents.shape[2]
    power = torch.fft.fft(latents.double(), dim=2, norm="ortho").abs().square().mean((0, 1, 3, 4))
    return _binned(torch.fft.fftfreq(frames, dtype=torch.float64).abs() * frames, power, frames)


def _binned(cycles: Tensor, power: Tensor, side: int) -> Spectrum:
    place = cycles.round().long()
    bins = range(side // 2 + 1)
    means = [power[place == index].mean().item() for index in bins]
    return Spectrum(tuple(index / side for index in bins), tuple(means))


@dataclass(frozen=True)
class Proposal:
    """A step of a proposed ladder: the share that would do, and the latent size it was rounded up to."""

    timestep: float
    safe_scale: float
    safe_frames: float
    size: tuple[int, ...]


def propose(
    spatial: Spectrum,
    temporal: Spectrum | None,
    process: Process,
    timesteps: Sequence[float],
    size: tuple[int, ...],
    multiple: int,
    masked: float = MASKED,
    least: float = LEAST,
) -> list[Proposal]:
    """The smallest safe latent size of each step, growing, the last one at full `size`.

    Args:
        timesteps: of the steps, falling.
        size: the full latent size, (H, W) or (T, H, W).
        multiple: what a latent side must be divisible by; sides are rounded up to the full side's shares of an eighth
            that are.
        least: share of the full side below which no step goes, however much the noise would hide.
    """
    steps: list[Proposal] = []
    for number, timestep in enumerate(timesteps):
        last = number == len(timesteps) - 1
        scale = spatial.safe_scale(process, timestep, masked)
        frames = temporal.safe_scale(process, timestep, masked) if temporal is not None else 1.0
        share = 1.0 if last else max(scale, least, steps[-1].size[-2] / size[-2] if steps else 0.0)
        eighths = next(
            n for n in range(1, 9) if n / 8 >= share - 1e-9 and all(side * n % (8 * multiple) == 0 for side in size[-2:])
        )
        chosen: tuple[int, ...] = tuple(side * eighths // 8 for side in size[-2:])
        if len(size) == 3:
            before = steps[-1].size[0] if steps else 1
            chosen = (size[0] if last else max(before, 1 + math.ceil(max(frames, least) * (size[0] - 1))), *chosen)
        steps.append(Proposal(timestep, scale, frames, chosen))
    return steps
