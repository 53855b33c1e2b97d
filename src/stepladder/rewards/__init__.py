"""Rewards: what reinforcement learning wants more of. Every module here that defines one is discovered by import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from stepladder.discovery import classes_in
from stepladder.rewards.base import Reward, RewardSpec


@lru_cache(maxsize=1)
def rewards() -> dict[str, type[Reward]]:
    """All rewards by name: every class of this package's modules that has one."""
    return {kind.name: kind for _, kind in classes_in(__name__, __path__) if issubclass(kind, Reward) and kind.name}


class WeightedSum(Reward):
    """Several rewards, each times its weight."""

    def __init__(self, parts: Sequence[Reward], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = list(weights)

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether all parts are."""
        return all(part.differentiable for part in self.parts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Weighted sum of the parts' scores, (B,)."""
        return torch.stack([weight * part(images, prompts) for part, weight in zip(self.parts, self.weights, strict=True)]).sum(0)


def build_reward(specs: Sequence[RewardSpec], device: torch.device) -> Reward:
    """The weighted sum of rewards as a recipe names them.

    Raises:
        UserError: a reward's files cannot be read.
    """
    return WeightedSum([rewards()[spec.name].build(spec, device) for spec in specs], [spec.weight for spec in specs])


def check_specs(specs: Sequence[RewardSpec]) -> None:
    """Refuse what no reward can be built from, before anything is loaded.

    Raises:
        ValueError: a name is unknown, or what its reward needs is not given.
    """
    for spec in specs:
        if spec.name not in rewards():
            raise ValueError(f"unknown reward {spec.name!r}; known rewards: {', '.join(sorted(rewards()))}")
        for key in rewards()[spec.name].needs:
            if getattr(spec, key) is None:
                raise ValueError(f"the {spec.name} reward needs {key}: {RewardSpec.model_fields[key].description}")
