"""A reward of your own: a Python function named in the recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepladder.errors import UserError
from stepladder.rewards.base import Reward, RewardSpec


class Function(Reward):
    """`function: package.module:name`, called with images (B, 3, H, W) in [-1, 1] and B prompts, gives B scores."""

    name = "function"
    needs = ("function",)

    def __init__(self, call: Callable[[Tensor, Sequence[str]], Tensor], differentiable: bool) -> None:
        self.call = call
        self.differentiable = differentiable

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """Import the function; UserError if there is none of that name."""
        module, _, name = (spec.function or "").partition(":")
        try:
            return cls(getattr(importlib.import_module(module), name), spec.differentiable)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"reward function {spec.function!r} cannot be imported ({error}); write package.module:name") from error

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,)."""
        scores = self.call(images, prompts)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != (len(images),):
            raise UserError(f"the reward function gave {shape} where a tensor of {(len(images),)} is wanted: one score a picture")
        if self.differentiable and images.requires_grad and not scores.requires_grad:
            raise UserError("the reward function passes no gradient to the images; set differentiable to false and use dpo or grpo")
        return scores
