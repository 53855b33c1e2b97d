"""What a reward is, and how a recipe names one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class RewardSpec(BaseModel):
    """A reward in a recipe."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="clip, pickscore, hpsv2, aesthetic, imagereward, judge, or function")
    weight: float = 1.0
    path: str | None = Field(None, description="the model's folder or hub id")
    weights: Path | None = Field(
        None,
        description="one safetensors file: another CLIP's in open_clip's names, HPSv2's, ImageReward's, the aesthetic head",
    )
    function: str | None = Field(None, description="of your own, as package.module:name")
    differentiable: bool = Field(False, description="whether a function of your own passes gradients to the images")


class Reward(ABC):
    """Scores pictures against their prompts; higher is better.

    name: as recipes call it · needs: what its entry in a recipe must say · differentiable: whether gradients reach the images, as
    ReFL needs.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    differentiable: bool = True

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """From a recipe's entry."""
        raise NotImplementedError

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of pictures (B, 3, height, width) in [-1, 1]."""
