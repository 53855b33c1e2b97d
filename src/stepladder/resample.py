"""U: resizing of latents in space (and blending of frames in time), and what it does to the variance of white noise."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ResampleMode = Literal["bilinear", "bicubic", "area"]


def resize(x: Tensor, size: tuple[int, ...], mode: ResampleMode = "bilinear") -> Tensor:
    """U of RMD Eq. 4 and Eq. 10: resize latents; the identity where the size does not change.

    Args:
        x: (B, C, H, W), or (B, C, T, H, W) for video.
        size: the new (H, W), or (T, H, W); frames are blended linearly.
        mode: the spatial kernel.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.ndim == 5:
        frames, space = size[0], size[1:]
        if x.shape[2] != frames:
            batch, channels, _, height, width = x.shape
            x = F.interpolate(x.flatten(3), (frames, height * width), mode="bilinear", align_corners=False)
            x = x.unflatten(3, (height, width))
        flat = x.transpose(1, 2).flatten(0, 1)
        return resize(flat, space, mode).unflatten(0, (x.shape[0], frames)).transpose(1, 2)
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "area" else False)


def shrink(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pictures (B, 3, H, W), or video (B, 3, T, H, W), averaged down to a smaller pixel `size` (SwD section 4.1)."""
    return images if tuple(images.shape[2:]) == tuple(size) else F.interpolate(images, size, mode="area")


@lru_cache(maxsize=256)
def noise_gain(before: tuple[int, ...], after: tuple[int, ...], mode: ResampleMode = "bilinear") -> float:
    """Mean variance of U(eps) for white eps of variance 1 (0.39 for bilinear at factor 2).

    The kernels are separable, so the gain is a product over axes of the mean squared row norm of the 1-D operator.
    """
    gain = 1.0
    axes = [(mode, b, a) for b, a in zip(before[-2:], after[-2:], strict=True)]
    if len(before) == 3:
        axes.append(("bilinear", before[0], after[0]))
    for kernel, b, a in axes:
        rows = resize(torch.eye(b, dtype=torch.float64)[:, None, None, :].expand(-1, 1, 1, -1), (1, a), kernel)  # type: ignore[arg-type]
        gain *= (rows[:, 0, 0] ** 2).sum(0).mean().item()
    return gain
