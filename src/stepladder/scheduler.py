"""LadderScheduler: the cascade's step as a diffusers scheduler, for stock pipelines whose latents stay spatial."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from stepladder.errors import UserError
from stepladder.ladder import Ladder, Step
from stepladder.processes import TIMESTEPS, FlowProcess, predict_from_velocity
from stepladder.sampling import advance, derived_generators


class LadderScheduler(SchedulerMixin, ConfigMixin):
    """Climbs a ladder inside a stock flow pipeline: start it at the first rung's size, the image has the last one's.

    Args:
        timesteps: the rung timesteps, one a step.
        sizes: the latent size of each step, (H, W).
        mix: alpha of RMD Eq. 10 where the resolution grows.
        resample: kernel of U.
        preserve_variance: undo U's loss of variance.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0),
        sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 64), (128, 128), (128, 128)),
        mix: float = 1.0,
        resample: str = "bilinear",
        preserve_variance: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.process = FlowProcess()
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.init_noise_sigma = 1.0
        self.generators: list[torch.Generator] = []
        self.index = 0

    @classmethod
    def of(cls, ladder: Ladder, mix: float = 1.0, mode: str = "bilinear", preserve_variance: bool = False) -> LadderScheduler:
        """The scheduler of a ladder."""
        timesteps = tuple(step.timestep for step in ladder.steps)
        return cls(timesteps, tuple(step.size for step in ladder.steps), mix, mode, preserve_variance)  # type: ignore[arg-type]

    def ladder(self) -> Ladder:
        """The ladder, with stages counted by change of size; teacher timesteps are not kept beyond training."""
        steps: list[Step] = []
        for timestep, size in zip(self.config.timesteps, self.config.sizes, strict=True):
            stage = steps[-1].stage + (tuple(size) != steps[-1].size) if steps else 0
            steps.append(Step(int(stage), timestep, timestep, tuple(size)))
        ends = [after.timestep for before, after in zip(steps, steps[1:], strict=False) if after.stage != before.stage]
        return Ladder(tuple(steps), (TIMESTEPS, *ends, 0.0))

    def options(self) -> dict[str, Any]:
        """The options of `cascade` that this scheduler was made with."""
        return {"mix": self.config.mix, "mode": self.config.resample, "preserve_variance": self.config.preserve_variance}

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **_: Any) -> None:
        """Accept the ladder's own number of steps only: the schedule belongs to the weights."""
        count = len(self.config.timesteps)
        if num_inference_steps is not None and num_inference_steps != count:
            raise UserError(f"this student takes {count} steps, not {num_inference_steps}; pass num_inference_steps={count}")
        self.timesteps = torch.tensor(self.config.timesteps, dtype=torch.float32, device=device)
        self.generators, self.index = [], 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Flow networks take the state as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of RMD Algorithm 2 from the network's velocity, (B, C, H, W)."""
        steps = self.ladder().steps
        here = steps[self.index]
        if tuple(sample.shape[2:]) != here.size:
            height, width = here.size
            raise UserError(
                f"step {self.index + 1} expects latents of {height}x{width}, got {sample.shape[2]}x{sample.shape[3]}: pass the "
                "first rung's height and width to the pipeline"
            )
        if self.index == 0:
            self.generators = derived_generators(sample)
        sigma = self.process.sigma(torch.tensor(here.timestep, device=sample.device))
        prediction = predict_from_velocity(sample.float(), model_output.float(), sigma)
        after = steps[self.index + 1] if self.index + 1 < len(steps) else None
        result = advance(self.process, prediction, here, after, self.generators, **self.options()).to(model_output.dtype)
        self.index += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)
