"""Packed latents, as FLUX's network takes them: one token of every 2 × 2 latent pixels."""

from __future__ import annotations

from torch import Tensor

PACK = 2


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W / 4, 4 C)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACK**2)


def unpack(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for a latent size (H, W)."""
    height, width = size
    x = tokens.reshape(len(tokens), height // PACK, width // PACK, -1, PACK, PACK)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
