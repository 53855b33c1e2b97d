"""Reinforcement learning as pure losses: reward gradients (ReFL), ranked pairs (DPO), groups (GRPO)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def refl_loss(rewards: Tensor) -> Tensor:
    """ReFL: less the mean reward; `rewards` (B,) with their graph back to the student."""
    return -rewards.mean()


def dpo_loss(chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO: -log sigmoid(-beta ((e_w - e_w_ref) - (e_l - e_l_ref))), mean over pairs.

    Args:
        chosen, rejected: (B,) mean squared errors of the student's predictions of the better and the worse image of a
            pair, noised alike; `…_reference` those of the network that the student was before.
    """
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return F.softplus(beta * margin).mean()


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: rewards (groups, members) less their group's mean, divided by its deviation; 0 in a group of equals."""
    mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, unbiased=False)
    return (rewards - mean) / (deviation + 1e-6)


def log_probability(x: Tensor, mean: Tensor, deviation: float | Tensor) -> Tensor:
    """log N(x; mean, deviation² I) divided by the number of elements, (B,).

    Divided, because ratios of undivided ones leave any clipping range at once (Flow-GRPO does the same).
    """
    z = ((x - mean) / deviation).float().flatten(1)
    scale = torch.as_tensor(deviation, dtype=torch.float32).log()
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).mean(1) - scale


def grpo_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """GRPO: less the mean of min(r A, clip(r, 1 - c, 1 + c) A), r the ratio of probabilities of steps that were taken.

    Args:
        new, old: (N,) log-probabilities under the student now and when it sampled.
        advantages: (N,).
    """
    ratio = torch.exp(new - old.detach())
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
