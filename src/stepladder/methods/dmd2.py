"""DMD2: Improved Distribution Matching Distillation, configuration and objective together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepladder.losses.matching import normalised_matching_loss
from stepladder.methods.base import Batch, Method, MethodConfig, Sample, drawn
from stepladder.methods.terms import Timesteps, uniform
from stepladder.prediction import Prediction
from stepladder.processes import TIMESTEPS
from stepladder.renoise import combine, gaussian, renoise
from stepladder.resample import ResampleMode
from stepladder.roles import Roles


class DMD2Config(MethodConfig):
    """Settings of DMD2; the defaults are those of the released SDXL script, without its GAN, which needs images."""

    name: Literal["dmd2"] = "dmd2"
    guidance_scale: float = Field(8.0, ge=1, description="classifier-free guidance on the real score")
    fake_updates: int = Field(5, ge=1, description="fake-score updates for each student update")
    timesteps: Timesteps = Field((20.0, 980.0), description="the student's samples are renoised uniformly in between")
    resample: ResampleMode = Field("bilinear", description="kernel of U, on ladders of several rungs")

    def sampler_options(self) -> dict[str, Any]:
        """Stochastic multistep sampling: fresh noise at every step (DMD2 section 4.4)."""
        return {"mix": 0.0, "mix_within": 0.0, "mode": self.resample}


class DMD2(Method):
    """Backward simulation with fresh noise at every step, then matching at the resolution of the sampled step.

    On a ladder of several rungs each step is matched at its own resolution: the method knows of no other.
    """

    Config = DMD2Config

    def roll_out(self, roles: Roles, batch: Batch, update: int, generator: torch.Generator) -> Sample:
        """DMD2 section 4.5: a step drawn for the batch, reached by the student's own sampling, renoised uniformly."""
        index = drawn(len(self.ladder.steps), generator)
        prediction = self.predict_at(roles, batch.conditioning, index, generator)
        low, high = self.config.timesteps
        timestep = self.renoise_times(low, high, update, batch, generator)
        step = self.ladder.steps[index]
        x = renoise(self.process, prediction, timestep, step.size, 0.0, generator)
        return Sample(prediction.x0, x, timestep, step.stage, batch.conditioning, update)

    def fake_score_matching(self, roles: Roles, sample: Sample, generator: torch.Generator) -> Tensor:
        """Denoising of the student's samples, renoised to any timestep: of noise, or of a flow's velocity (DMDR section 3.1)."""
        x0 = sample.x0.detach()
        timestep = uniform(0.0, TIMESTEPS, len(x0), generator, x0)
        noise = gaussian(tuple(x0.shape), generator, x0)
        prediction = roles.fake_score(combine(self.process, x0, noise, timestep), timestep, sample.conditioning)
        error = self.process.target(prediction.x0, prediction.eps) - self.process.target(x0, noise)
        return error.float().square().mean()

    def student_matching(self, sample: Sample, fake: Prediction, real: Prediction) -> Tensor:
        """DMD2 Eq. 1, the gradient divided by the teacher's mean distance from the sample."""
        return normalised_matching_loss(sample.x0, fake.x0, real.x0).mean()
