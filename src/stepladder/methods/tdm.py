"""TDM: Trajectory Distribution Matching, configuration and objective together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepladder.ladder import Step
from stepladder.losses.matching import fake_score_loss, importance_weight, trajectory_matching_loss
from stepladder.methods.base import Batch, Method, MethodConfig, Sample, drawn
from stepladder.prediction import Prediction
from stepladder.renoise import combine, mixed_noise
from stepladder.resample import ResampleMode
from stepladder.roles import Roles

ABOVE_IMAGE, BELOW_START = 20.0, 10.0


class TDMConfig(MethodConfig):
    """Settings of TDM; the defaults are those of the released PixArt script."""

    name: Literal["tdm"] = "tdm"
    snr_cap: float = Field(5.0, gt=0, description="upper bound of the fake score's SNR weight")
    huber: float = Field(1e-3, gt=0, description="Pseudo-Huber constant, elementwise")
    mix: float = Field(0.0, ge=0, le=1, description="share of predicted noise where resolution grows, on several rungs")
    resample: ResampleMode = Field("bilinear", description="kernel of U, on ladders of several rungs")

    def sampler_options(self) -> dict[str, Any]:
        """The ODE within a resolution."""
        return {"mix": self.mix, "mode": self.resample}


class TDM(Method):
    """Roll out the student's ODE; match the distribution of each segment of its trajectory.

    On a ladder of several rungs each segment is matched at its own resolution: the method knows of no other.
    """

    Config = TDMConfig

    def roll_out(self, roles: Roles, batch: Batch, update: int, generator: torch.Generator) -> Sample:
        """A segment drawn for the batch; t uniform in it, renoised from the segment's end as the forward process would.

        The state at t holds (alpha_t sigma_s / alpha_s) of the student's own noise, s being the segment's end, and fresh
        noise up to sigma_t.
        """
        index = drawn(len(self.ladder.steps), generator)
        step = self.ladder.steps[index]
        prediction = self.predict_at(roles, batch.conditioning, index, generator)
        low = max(step.end, ABOVE_IMAGE)
        timestep = self.renoise_times(low, max(low, step.timestep - BELOW_START), update, batch, generator)
        mixed, fresh = mixed_noise(prediction.eps, step.size, self.kept_share(step, timestep), generator)
        weight = importance_weight(mixed.detach(), fresh)
        x = combine(self.process, prediction.x0, mixed, timestep)
        return Sample(prediction.x0, x, timestep, step.stage, batch.conditioning, update, weight)

    def kept_share(self, step: Step, timestep: Tensor) -> Tensor:
        """The TDM renoise: mix = (alpha_t sigma_s / alpha_s) / sigma_t with s the end of the step's segment, (B,)."""
        end = torch.tensor(step.end, device=timestep.device)
        kept = self.process.alpha(timestep) * self.process.sigma(end) / self.process.alpha(end)
        return (kept / self.process.sigma(timestep)).clamp(max=1.0)

    def fake_score_matching(self, roles: Roles, sample: Sample, generator: torch.Generator) -> Tensor:
        """min(SNR, cap) times the importance weight times the error of x0, mean over the batch."""
        prediction = roles.fake_score(sample.x.detach(), sample.timestep, sample.conditioning)
        logsnr = self.process.logsnr(sample.timestep)
        losses = fake_score_loss(prediction.x0, sample.x0, logsnr, self.config.snr_cap)
        return (losses if sample.weight is None else sample.weight * losses).mean()

    def student_matching(self, sample: Sample, fake: Prediction, real: Prediction) -> Tensor:
        """Elementwise Pseudo-Huber towards the guided teacher, divided by its mean distance."""
        return trajectory_matching_loss(sample.x0, fake.x0, real.x0, self.config.huber).mean()
