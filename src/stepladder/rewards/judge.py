"""The bundled world's judge as a reward: how probable it finds what the caption asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepladder.rewards.base import Reward, RewardSpec
from stepladder.world.captions import read_caption
from stepladder.world.judge import IGNORED, Judge, answers, head_sizes, load_judge
from stepladder.world.paths import JUDGE


class JudgeReward(Reward):
    """Mean log-probability of the attributes asked for, (B,), at most 0; `path` names another judge's weights."""

    name = "judge"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @classmethod
    def build(cls, spec: RewardSpec, device: torch.device) -> Reward:
        """The bundled judge, or the one at `path`."""
        return cls(load_judge(Path(spec.path) if spec.path else JUDGE).to(device))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,)."""
        truth = answers([read_caption(prompt) for prompt in prompts]).to(images.device)
        logits, _ = self.judge(images.float())
        parts = [part.log_softmax(1) for part in logits.split(head_sizes(), dim=1)]
        asked = truth != IGNORED
        picked = [part.gather(1, truth[:, index : index + 1].clamp(min=0))[:, 0] for index, part in enumerate(parts)]
        return (torch.stack(picked, 1) * asked).sum(1) / asked.sum(1)
