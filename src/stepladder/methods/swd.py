"""SwD: Scale-wise Distillation, configuration and objective together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepladder.ladder import spaced_timesteps
from stepladder.losses.matching import normalised_matching_loss
from stepladder.methods.base import Batch, Method, MethodConfig, Sample, drawn
from stepladder.methods.terms import GANTerm, MMDTerm
from stepladder.prediction import Prediction
from stepladder.renoise import combine, gaussian, renoise
from stepladder.resample import ResampleMode
from stepladder.roles import Roles

GRID = spaced_timesteps(28, 3.0)


class SwDConfig(MethodConfig):
    """Settings of SwD; the defaults are the paper's (appendix A) and, where it is silent, the released script's."""

    name: Literal["swd"] = "swd"
    fake_updates: int = Field(5, ge=1, description="fake-score updates for each student update")
    gan: GANTerm | None = Field(default_factory=GANTerm, description="adversarial term on the fake score's features")
    mmd: MMDTerm | None = Field(default_factory=MMDTerm, description="MMD term on the frozen teacher's features")
    first_renoise: int = Field(12, ge=0, lt=len(GRID), description="noisiest of 28 shift-3 timesteps the student is matched at")
    resample: ResampleMode = Field("bicubic", description="kernel of U; frames are blended linearly")

    def sampler_options(self) -> dict[str, Any]:
        """Stochastic multistep sampling; U is bicubic (SwD section 4.1)."""
        return {"mix": 0.0, "mix_within": 0.0, "mode": self.resample}


class SwD(Method):
    """One step of the ladder at a time, from real or teacher-made images: the lower scale of an adjacent pair is scaled
    up and noised, the student predicts the higher one, and is matched there."""

    Config = SwDConfig

    @classmethod
    def wants_images(cls, config: MethodConfig) -> bool:
        """Always: they are what the student starts from."""
        return True

    def roll_out(self, roles: Roles, batch: Batch, update: int, generator: torch.Generator) -> Sample:
        """SwD Figure 3: a pair of adjacent scales drawn for the batch; the student's prediction at the higher one.

        The first step has no lower scale, and starts from noise.
        """
        index = drawn(len(self.ladder.steps), generator)
        step, before = self.ladder.steps[index], self.ladder.steps[max(0, index - 1)]
        low = batch.real(before.size)
        clock = torch.tensor(step.timestep, device=low.device)
        image = Prediction(low, torch.zeros_like(low))
        if index:
            state = renoise(self.process, image, clock, step.size, 0.0, generator, self.config.resample)
        else:
            # as in sampling, also where the schedule never quite reaches pure noise
            state = gaussian(tuple(low.shape), generator, low)
        prediction = roles.student(state, clock, batch.conditioning)
        # times are drawn as places of the grid, which falls: high noise is where the place is low
        places = self.renoise_times(len(GRID), self.config.first_renoise, update, batch, generator)
        x, timestep = self._renoised(prediction.x0, places.cpu().long().clamp(max=len(GRID) - 1), generator)
        return Sample(prediction.x0, x, timestep, step.stage, batch.conditioning, update)

    def _renoised(self, x0: Tensor, places: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        timestep = torch.tensor(GRID)[places].to(x0.device)
        return combine(self.process, x0, gaussian(tuple(x0.shape), generator, x0), timestep), timestep

    def fake_score_matching(self, roles: Roles, sample: Sample, generator: torch.Generator) -> Tensor:
        """Regression of x0 on the student's samples, renoised to any timestep of the grid."""
        x0 = sample.x0.detach()
        x, timestep = self._renoised(x0, torch.randint(len(GRID), (len(x0),), generator=generator), generator)
        prediction = roles.fake_score(x, timestep, sample.conditioning)
        return (prediction.x0 - x0).float().square().mean()

    def student_matching(self, sample: Sample, fake: Prediction, real: Prediction) -> Tensor:
        """SwD's L_DMD: the gradient of DMD2 Eq. 1, divided by the teacher's mean distance from the sample."""
        return normalised_matching_loss(sample.x0, fake.x0, real.x0).mean()
