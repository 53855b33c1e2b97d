"""The GAN term of DMD2 and SwD: softplus losses and a small head on a diffusion network's features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 4


class Discriminator(nn.Sequential):
    """Image or video to one logit from its token means: a head of four layers with LayerNorm and GELU (SwD appendix A)."""

    def __init__(self, width: int) -> None:
        hidden = max(8, width // 4)
        layers: list[nn.Module] = [nn.Linear(width, hidden)]
        for _ in range(LAYERS - 2):
            layers += [nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        super().__init__(*layers, nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, tokens, D) to logits (B,)."""
        return super().forward(features.float().mean(1))[:, 0]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-real) + softplus(fake), mean over the batch of logits (B,)."""
    # DMD2 section 4.3, non-saturating
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """softplus(-fake), mean over the batch of logits (B,): the student wants to be taken for real."""
    # DMD2 section 4.3, non-saturating
    return F.softplus(-fake).mean()
