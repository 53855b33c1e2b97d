"""Distribution matching: what moves the student, and what keeps the fake score up to date (RMD, DMD2, TDM, SwD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepladder.processes import spread

HUBER = 0.00054


def pseudo_huber(difference: Tensor, constant: float = HUBER) -> Tensor:
    """sqrt(|d|² + C²) - C per sample, C = constant sqrt(d) with d the elements of one sample (RMD appendix B).

    Args:
        difference: (B, …).

    Returns:
        (B,).
    """
    c = constant * math.sqrt(difference[0].numel())
    return (difference.flatten(1).float().square().sum(1) + c * c).sqrt() - c


def matching_loss(x: Tensor, fake_eps: Tensor, real_eps: Tensor, constant: float = HUBER) -> Tensor:
    """Student loss per sample: Pseudo-Huber distance from x_t to sg(x_t + s_fake - s_real).

    s is the predicted noise: only so does the sign of Eq. 8 as printed move x_t towards the teacher, because
    eps_fake - eps_real = (alpha / sigma) (x0_real - x0_fake).

    Args:
        x: (B, …), the student's state projected to full resolution, with its graph.
        fake_eps, real_eps: noise predictions at x, of the fake score and of the guided teacher.
    """
    # RMD Eq. 8
    target = (x + fake_eps - real_eps).detach()
    return pseudo_huber(x - target, constant)


def fake_score_loss(prediction: Tensor, target: Tensor, logsnr: Tensor, cap: float = 5.0) -> Tensor:
    """Fake-score loss per sample: min(SNR, cap) times the mean squared error of x0 at full resolution.

    The paper's weight is the SNR itself, unbounded as sigma → 0; the cap is TDM's.

    Args:
        prediction: (B, …), the fake score's x0.
        target: (B, …), the student's upsampled x0.
        logsnr: (B,), of the timestep the state was renoised to.
    """
    # RMD Eq. 9
    weight = torch.exp(logsnr.float()).clamp(max=cap)
    return weight * (prediction.float() - target.detach().float()).flatten(1).square().mean(1)


def matching_direction(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> tuple[Tensor, Tensor]:
    """g = x0_fake - x0_real and w = mean |x0 - x0_real| per sample, in double precision as TDM has it.

    DMD2, TDM and SwD all descend along g / w: what differs between the student's and the teacher's distribution, in
    units of how far the teacher still is from the student's sample.

    Args:
        x0: (B, …), the student's sample.
        fake_x0, real_x0: predictions of the fake score and of the guided teacher at the renoised sample.

    Returns:
        (B, …) and (B,).
    """
    distance = (x0.detach().double() - real_x0.double()).abs().flatten(1).mean(1)
    return (fake_x0 - real_x0).detach(), distance.clamp(min=1e-8).to(x0.dtype)


def normalised_matching_loss(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """DMD2's and SwD's student loss per sample: half the mean squared distance to sg(x0 - g / w).

    Its gradient is g / w, divided by the elements of a sample.
    """
    # DMD2 Eq. 1 (as released)
    direction, distance = matching_direction(x0, fake_x0, real_x0)
    target = (x0 - direction / spread(distance, x0)).detach()
    return 0.5 * (x0 - target).float().flatten(1).square().mean(1)


def trajectory_matching_loss(x0: Tensor, fake_x0: Tensor, real_x0: Tensor, constant: float = 1e-3) -> Tensor:
    """TDM's student loss per sample: elementwise Pseudo-Huber distance to sg(x0 - g), mean, divided by w."""
    # TDM student loss (as released)
    direction, distance = matching_direction(x0, fake_x0, real_x0)
    difference = (x0 - (x0 - direction).detach()).float()
    return ((difference.square() + constant**2).sqrt() - constant).flatten(1).mean(1) / distance


def importance_weight(mixed: Tensor, fresh: Tensor) -> Tensor:
    """The TDM importance weight per sample: exp(-½ mean eps_mix²) / exp(-½ mean xi²).

    The density of the noise that a state really holds, partly the student's own prediction, over that of fresh noise.

    Args:
        mixed: (B, …), the noise in the state.
        fresh: (B, …), its fresh share xi.
    """

    def energy(noise: Tensor) -> Tensor:
        return noise.float().square().flatten(1).mean(1)

    return torch.exp(0.5 * (energy(fresh) - energy(mixed)))
