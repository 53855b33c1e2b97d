"""The world's autoencoder: a small AutoencoderTiny, eight times down, trained on renders at both of the ladder's sizes."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from stepladder.precision import autocast, pick_device
from stepladder.renoise import gaussian
from stepladder.world.phase import Phase, run_phase, warm_then_decay
from stepladder.world.render import render
from stepladder.world.scenes import draw_scene

LATENT_CHANNELS = 8
POOL = 3000
CROP = 64


def build_autoencoder() -> AutoencoderTiny:
    """An untrained autoencoder of the world: (B, 3, H, W) in [-1, 1] ↔ (B, 8, H/8, W/8).

    It has no normalisation over the picture, so crops teach it as well as whole pictures do.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )
    return vae.to(memory_format=torch.channels_last)


def draw_renders(count: int, size: int, seed: str) -> Tensor:
    """`count` training renders, (count, 3, size, size), a function of `seed` alone."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    return torch.cat([render(scenes[start : start + 64], size, generator) for start in range(0, count, 64)])


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Error of colours, squared and absolute, and, so that edges stay crisp, of differences between neighbouring pixels."""
    loss = F.l1_loss(output, target) + 5 * F.mse_loss(output, target)
    for axis in (-1, -2):
        loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def train_autoencoder(folder: Path, steps: int, seed: int) -> AutoencoderTiny:
    """Train the autoencoder, then set `scaling_factor` and `shift_factor` so that latents have mean 0 and deviation 1."""
    torch.manual_seed(seed)
    device = pick_device("auto")
    vae = build_autoencoder().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    pool: list[Tensor] = []

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if not pool:
            pool.extend(draw_renders(POOL, size, f"autoencoder/{seed}/{size}") for size in (64, 128))
        rng = random.Random(f"autoencoder/{seed}/{step}")
        source = pool[step % 2]
        rows = [rng.randrange(POOL) for _ in range(8)]
        top, left = (rng.randint(0, source.shape[-1] - CROP) for _ in range(2))
        images = source[rows, :, top : top + CROP, left : left + CROP].to(device, memory_format=torch.channels_last)
        with autocast(device, "auto"):
            latents = vae.encode(images).latents
            output = vae.decode(latents + 0.05 * gaussian(tuple(latents.shape), generator, latents)).sample
        return reconstruction_loss(output.float(), images) + 1e-4 * latents.float().square().mean()

    run_phase(
        Phase("autoencoder", {"vae": vae}, [optimizer], steps, loss, warm_then_decay(100, steps), average=0.995), folder, seed
    )
    vae.to("cpu").eval().requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(draw_renders(256, 128, f"scale/{seed}")).latents
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def encode_images(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    """Images in [-1, 1], (B, 3, H, W), to normalised latents (B, C, H/8, W/8)."""
    with torch.no_grad():
        latents = vae.encode(images.to(vae.dtype)).latents
    return (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
