"""Pictures as vision encoders want them, with a gradient: bicubic with antialiasing, as Pillow does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def scaled(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, clipped to [0, 1] as 8-bit pictures are."""
    if tuple(images.shape[2:]) == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def cropped(images: Tensor, side: int) -> Tensor:
    """Shortest side to `side`, then the middle square: CLIP's, PickScore's, ImageReward's way.

    Args:
        images: (B, 3, height, width) in [-1, 1].

    Returns:
        (B, 3, side, side), normalised.
    """
    pictures = unit(images)
    height, width = pictures.shape[2:]
    short = min(height, width)
    pictures = scaled(pictures, int(side * height / short), int(side * width / short))
    top, left = (pictures.shape[2] - side) // 2, (pictures.shape[3] - side) // 2
    return normalised(pictures[:, :, top : top + side, left : left + side])


def letterboxed(images: Tensor, side: int) -> Tensor:
    """Longest side to `side`, black bars around the rest, then normalised: HPSv2's way."""
    pictures = unit(images)
    height, width = pictures.shape[2:]
    scale = side / max(height, width)
    pictures = scaled(pictures, round(height * scale), round(width * scale))
    down, across = side - pictures.shape[2], side - pictures.shape[3]
    return normalised(F.pad(pictures, (across // 2, across - across // 2, down // 2, down - down // 2)))


def unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (images.float() + 1) / 2


def normalised(pictures: Tensor) -> Tensor:
    """CLIP's means and deviations taken out."""
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std
