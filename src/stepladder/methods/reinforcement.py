"""DMDR's terms of reinforcement learning: ReFL, DPO and GRPO beside any method's distillation, or alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from stepladder.conditioning import Conditioning
from stepladder.ladder import Step
from stepladder.losses.reinforcement import dpo_loss, group_advantages, grpo_loss, log_probability, refl_loss
from stepladder.methods.terms import Ground
from stepladder.prediction import Prediction
from stepladder.processes import Process
from stepladder.renoise import combine, gaussian
from stepladder.resample import ResampleMode, resize
from stepladder.rewards import check_specs
from stepladder.rewards.base import RewardSpec
from stepladder.roles import Role, bound
from stepladder.sampling import cascade, initial_noise

Score = Callable[[Tensor], Tensor]
EXPLORATION = 0.7


class RLTerm(BaseModel):
    """A term that wants more reward; it begins when the cold start is over.

    balance: the term's gradient is multiplied so that its running norm is `weight` times that of the distillation's, and one
    number means the same for every reward and algorithm; without, or alone, the loss itself is multiplied by `weight`.
    """

    model_config = ConfigDict(extra="forbid")

    algorithm: Literal["refl", "dpo", "grpo"] = "refl"
    rewards: list[RewardSpec] = Field(min_length=1, description="what to want, a weighted sum")
    weight: float = Field(0.5, gt=0)
    balance: bool = True
    alone: bool = Field(False, description="leave the distillation out once this term begins; rewards are then easily hacked")
    beta: float = Field(2000.0, gt=0, description="dpo: how hard a pair's margin is pressed")
    group: int = Field(4, ge=2, description="grpo: samples of a prompt")
    exploration: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="grpo: share of predicted noise kept at each step, the rest is fresh; by default as the method samples, or 0.7 "
        "where it samples without fresh noise",
    )
    clip: float = Field(0.2, gt=0, description="grpo: how far the ratio of probabilities may leave 1, where samples are used again")
    decoder: str | None = Field(
        None, description="folder of a tiny VAE (AutoencoderTiny) to decode with; the model's own by default"
    )
    crop: int | None = Field(None, ge=8, description="decode only a random square of so many latent pixels")

    @field_validator("rewards")
    @classmethod
    def _known(cls, value: list[RewardSpec]) -> list[RewardSpec]:
        check_specs(value)
        return value


def repeated(conditioning: Conditioning, times: int) -> Conditioning:
    """The prompts, one after another, `times` over."""
    return Conditioning.cat([conditioning] * times)


def refl_term(x0: Tensor, score: Score) -> Tensor:
    """ReFL: the reward's gradient through the decoder to the step that was sampled, which predicts a clean image."""
    # DMDR section 4.3
    return refl_loss(score(x0))


def dpo_term(term: RLTerm, ground: Ground, score: Score, options: dict[str, Any]) -> Tensor:
    """DPO: two samples a prompt, ranked by reward, then told apart at one of the ladder's steps.

    Both images of a pair are noised alike to the step, and the student's predictions of them are compared with those of
    the reference: the student as it was when this term began.
    """
    roles, process, ladder, generator = ground.roles, ground.process, ground.ladder, ground.generator
    prompts, like = repeated(ground.conditioning, 2), ground.conditioning.like
    with torch.no_grad():
        noise = initial_noise(ladder, len(prompts), ground.channels, generator, like)
        both = cascade(bound(roles.student, prompts), process, ladder, noise, generator, **options)
        first, second = both.chunk(2)
        one, other = score(both).chunk(2)
    better, worse = (mask.reshape(-1, *(1,) * (first.ndim - 1)) for mask in (one > other, one < other))
    # a tie teaches nothing: such a pair is one image twice
    chosen, rejected = torch.where(worse, second, first), torch.where(better, second, first)
    step = ladder.steps[int(torch.randint(len(ladder.steps), (), generator=generator))]
    targets = [resize(image, step.size) for image in (chosen, rejected)]
    fresh = gaussian(tuple(targets[0].shape), generator, targets[0])
    clock = torch.tensor(step.timestep, device=fresh.device)
    states = torch.cat([combine(process, target, fresh, clock) for target in targets])
    goal = torch.cat([process.target(target, fresh) for target in targets])

    def errors(role: Role) -> tuple[Tensor, Tensor]:
        predicted = role(states, clock, prompts)
        found = (process.target(predicted.x0, predicted.eps) - goal).float().square().flatten(1).mean(1).chunk(2)
        return found[0], found[1]

    with torch.no_grad():
        before = errors(roles.reference)
    return dpo_loss(*errors(roles.student), *before, term.beta)


def grpo_term(term: RLTerm, ground: Ground, score: Score, mode: ResampleMode, within: float) -> Tensor:
    """GRPO: groups of samples a prompt, drawn with fresh noise at every step, whose steps are made more or less probable.

    A step's state is N(alpha_t U(x0) + sigma_t m U(eps), sigma_t² (1 - m²)), m being `exploration`: the sampler's renoise, so
    its log-probability is exact. The last step has no noise and so no probability: its reward reaches the steps before it. One
    of those is taken for the batch. Every sample is learned from once, by the weights that drew it: the ratio is 1, its gradient
    the policy gradient, and `clip` idle.

    Args:
        within: share of predicted noise that the method's own sampler keeps within a resolution.
    """
    mix = term.exploration if term.exploration is not None else within if within < 1 else EXPLORATION
    process, ladder, generator = ground.process, ground.ladder, ground.generator
    prompts, like = repeated(ground.conditioning, term.group), ground.conditioning.like
    student, states = bound(ground.roles.student, prompts), []
    with torch.no_grad():
        x = initial_noise(ladder, len(prompts), ground.channels, generator, like)
        for step, after in zip(ladder.steps, [*ladder.steps[1:], None], strict=True):
            prediction = student(x, torch.tensor(step.timestep, device=x.device))
            if after is None:
                rewards = score(prediction.x0)
                break
            mean, deviation = transition(process, prediction, after, mix, mode)
            onward = mean + deviation * gaussian(tuple(mean.shape), generator, mean)
            states.append((step, after, x, onward, log_probability(onward, mean, deviation)))
            x = onward
    # members of a group are as many rows apart as the batch has prompts
    advantages = group_advantages(rewards.view(term.group, -1).T).T.flatten()
    step, after, x, onward, old = states[int(torch.randint(len(states), (), generator=generator))]
    mean, deviation = transition(process, student(x, torch.tensor(step.timestep, device=x.device)), after, mix, mode)
    return grpo_loss(log_probability(onward, mean, deviation), old, advantages, term.clip)


def transition(process: Process, prediction: Prediction, after: Step, mix: float, mode: ResampleMode) -> tuple[Tensor, Tensor]:
    """Mean (B, …) and deviation of the next step's state under `renoise` with a share `mix` of predicted noise."""
    clock = torch.tensor(after.timestep, device=prediction.x0.device)
    x0, eps = resize(prediction.x0, after.size, mode), resize(prediction.eps, after.size, mode)
    return combine(process, x0, mix * eps, clock), process.sigma(clock) * (1 - mix**2) ** 0.5
