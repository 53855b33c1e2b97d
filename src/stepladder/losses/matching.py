"""Distribution matching: what moves the student (RMD Eq. 8) and what keeps the fake score up to date (RMD Eq. 9)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
