"""Terms that any method can add: a GAN on the fake score's features, MMD on the frozen teacher's."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.losses.adversarial import Discriminator, discriminator_loss, generator_loss
from stepladder.losses.discrepancy import Kernel, pooled, squared_mmd
from stepladder.processes import Process
from stepladder.renoise import combine, gaussian
from stepladder.roles import Roles

Timesteps = tuple[float, float]


class GANTerm(BaseModel):
    """DMD2's adversarial term; the weights are those of the released code."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(5e-3, gt=0, description="of the student's adversarial loss")
    discriminator_weight: float = Field(1e-2, gt=0, description="of the discriminator's loss, beside the fake score's own")
    timesteps: Timesteps = Field((0.0, 1000.0), description="images are noised to a timestep in this interval before features")


class MMDTerm(BaseModel):
    """SwD's term: MMD between features of generated and of real images, of the same prompt and the same noise."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(1.0, gt=0)
    kernel: Kernel = "linear"
    bandwidth: float = Field(100.0, gt=0, description="of the rbf kernel")
    pool: Literal["image", "batch"] = Field("image", description="compare image by image, or the batch as one")
    timesteps: Timesteps = Field((0.0, 600.0), description="images are noised to a timestep in this interval; [0, 0] is none")


def noised_alike(
    process: Process, images: list[Tensor], timesteps: Timesteps, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Latents (B, C, …) of several kinds noised to the same random timesteps (B,) with the same noise."""
    first = images[0]
    low, high = timesteps
    timestep = (low + (high - low) * torch.rand(len(first), generator=generator)).to(first.device)
    noise = gaussian(tuple(first.shape), generator, first)
    return [combine(process, each, noise, timestep) for each in images], timestep


def discriminator_term(
    term: GANTerm,
    head: Discriminator,
    roles: Roles,
    process: Process,
    fake: Tensor,
    real: Tensor,
    conditioning: Conditioning,
    generator: torch.Generator,
) -> Tensor:
    """What head and fake score learn: to tell the student's samples, (B, C, …), from images."""
    (real, fake), timestep = noised_alike(process, [real, fake], term.timesteps, generator)
    both = roles.fake_score.features(torch.cat([real, fake]), timestep.repeat(2), Conditioning.cat([conditioning] * 2))
    return term.discriminator_weight * discriminator_loss(*head(both).chunk(2))


def generator_term(
    term: GANTerm,
    head: Discriminator,
    roles: Roles,
    process: Process,
    fake: Tensor,
    conditioning: Conditioning,
    generator: torch.Generator,
) -> Tensor:
    """What the student learns from the discriminator; the gradient passes through the fake score and its head."""
    (state,), timestep = noised_alike(process, [fake], term.timesteps, generator)
    return term.weight * generator_loss(head(roles.fake_score.features(state, timestep, conditioning)))


def mmd_term(
    term: MMDTerm,
    roles: Roles,
    process: Process,
    fake: Tensor,
    real: Tensor,
    conditioning: Conditioning,
    generator: torch.Generator,
) -> Tensor:
    """SwD's L_MMD on the middle block of the frozen teacher; the gradient passes through the teacher to the sample."""
    (fake, real), timestep = noised_alike(process, [fake, real], term.timesteps, generator)
    seen = roles.teacher.features(fake, timestep, conditioning)
    with torch.no_grad():
        wanted = roles.teacher.features(real, timestep, conditioning)
    if term.pool == "batch":
        seen, wanted = pooled(seen), pooled(wanted)
    return term.weight * squared_mmd(wanted, seen, term.kernel, term.bandwidth).mean()
