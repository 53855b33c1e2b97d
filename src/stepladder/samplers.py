"""A sampler is a network in its role, a ladder, and how they go together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.conditioning import Conditioning
from stepladder.ladder import Ladder
from stepladder.precision import autocast, synchronize
from stepladder.prediction import Prediction
from stepladder.roles import Role
from stepladder.sampling import cascade, derived_generators, initial_noise


@dataclass(frozen=True)
class Sampler:
    """A network in its role, the ladder it climbs, and its guidance.

    `nfe` counts passes, two a step under guidance unless the network embeds it.
    """

    role: Role
    ladder: Ladder
    guidance_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        """Network passes for one image."""
        return len(self.ladder.steps) * self.role.passes(self.guidance_scale)


def seeded_noise(backbone: Backbone, ladder: Ladder, seeds: list[int], like: Tensor) -> Tensor:
    """Initial noise, each sample from its own seed, so that an image does not depend on its batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return initial_noise(ladder, len(seeds), backbone.latent_channels, generators, like)


def sample(
    sampler: Sampler,
    backbone: Backbone,
    conditioning: Conditioning,
    unconditional: Conditioning,
    seeds: list[int],
    precision: str = "auto",
    watch: Any = None,
) -> Tensor:
    """Latents of one batch: (B, C, …) at the ladder's final size, in float32."""
    like = conditioning.like
    noise = seeded_noise(backbone, sampler.ladder, seeds, like)
    empty = unconditional.expand(len(conditioning))

    def denoise(x: Tensor, timestep: Tensor) -> Prediction:
        return sampler.role.guided(x, timestep, conditioning, empty, sampler.guidance_scale)

    with torch.no_grad(), autocast(like.device, precision):
        generators = derived_generators(noise)
        return cascade(denoise, backbone.process, sampler.ladder, noise, generators, watch=watch, **sampler.options).float()


@dataclass
class Sampled:
    """Images (N, 3, H, W), or video (N, 3, T, H, W), in [-1, 1], and seconds per image in the network and in the decoder."""

    images: Tensor
    seconds_per_image: float
    decode_seconds_per_image: float


def sample_many(
    sampler: Sampler,
    backbone: Backbone,
    conditioning: Conditioning,
    unconditional: Conditioning,
    seeds: list[int],
    batch: int = 64,
    precision: str = "auto",
    advance: Any = None,
) -> Sampled:
    """Images of many prompts, batch by batch; `advance(n)` is told of every n images done. Seconds are medians a batch."""
    images: list[Tensor] = []
    network: list[float] = []
    decoder: list[float] = []
    for start in range(0, len(seeds), batch):
        rows = slice(start, start + batch)
        began = time.perf_counter()
        latents = sample(sampler, backbone, conditioning.rows(rows), unconditional, seeds[rows], precision)
        synchronize(latents.device)
        middle = time.perf_counter()
        with autocast(latents.device, precision):
            images.append(backbone.decode(latents).cpu())
        count = len(latents)
        if count == batch or not network:
            network.append((middle - began) / count)
            decoder.append((time.perf_counter() - middle) / count)
        if advance is not None:
            advance(count)
    return Sampled(torch.cat(images), torch.tensor(network).median().item(), torch.tensor(decoder).median().item())
