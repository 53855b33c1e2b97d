"""Maximum mean discrepancy between features of generated and of real images (SwD Eq. 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]


def squared_mmd(real: Tensor, fake: Tensor, kernel: Kernel = "linear", bandwidth: float = 100.0) -> Tensor:
    """MMD² between the tokens of each pair of images, (B,), divided by the features' width.

    The linear kernel compares token means: with k(x, y) = x·y, MMD² is the squared distance of the two means. The
    Gaussian kernel exp(-|x - y|² / (2 bandwidth²)), times bandwidth², compares all moments as far as tokens are apart by about the
    bandwidth; with a much wider one it is the linear kernel. Its estimate leaves out the diagonal and so is unbiased, and can be
    negative.

    Args:
        real, fake: (B, tokens, D).
    """
    real, fake = real.float(), fake.float()
    if kernel == "linear":
        # SwD Eq. 2
        return (real.mean(1) - fake.mean(1)).square().mean(1)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :] - 2 * a @ b.transpose(1, 2)
        return torch.exp(-squares / (2 * bandwidth**2))

    def own(a: Tensor) -> Tensor:
        tokens = a.shape[1]
        return (similarity(a, a).sum((1, 2)) - tokens) / (tokens * (tokens - 1))

    return bandwidth**2 / real.shape[2] * (own(real) + own(fake) - 2 * similarity(real, fake).mean((1, 2)))


def pooled(features: Tensor) -> Tensor:
    """All tokens of a batch as those of one image, (1, B tokens, D): the variant B of SwD Table 6."""
    return features.flatten(0, 1)[None]
