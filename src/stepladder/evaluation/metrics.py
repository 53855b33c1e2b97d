"""Figures of a set of images: prompt accuracy, FID on judge features, diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepladder.images import to_uint8
from stepladder.world.judge import FEATURES, Judge, Verdict, judge_scenes
from stepladder.world.scenes import Scene


class JudgeFeatures(nn.Module):
    """The judge as torchmetrics wants a feature network: uint8 images in, (B, FEATURES) features out."""

    num_features = FEATURES

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to features."""
        return self.judge(images.float() / 127.5 - 1)[1]


def frechet_distance(judge: Judge, images: Tensor, reference: Tensor, batch: int = 128) -> float:
    """FID between two sets of images, each (N, 3, H, W) in [-1, 1], in the judge's feature space."""
    metric = FrechetInceptionDistance(feature=JudgeFeatures(judge))
    for real, chosen in ((True, reference), (False, images)):
        for part in chosen.split(batch):
            metric.update(to_uint8(part), real=real)
    return metric.compute().item()


def prompt_accuracy(judge: Judge, images: Tensor, scenes: Sequence[Scene], batch: int = 128) -> dict[str, float]:
    """Share of images that show every attribute of their caption at once (`prompt_accuracy`), and each attribute's own."""
    with torch.no_grad():
        logits = torch.cat([judge(part)[0] for part in images.split(batch)])
    verdict = judge_scenes(logits, scenes)
    means = {field.name: getattr(verdict, field.name).mean().item() for field in fields(Verdict)}
    return {"prompt_accuracy": means.pop("right"), **{f"{name}_accuracy": value for name, value in means.items()}}


def diversity(judge: Judge, groups: Tensor) -> float:
    """Mean pairwise feature distance between images of one caption, (captions, seeds, 3, H, W), mean over captions."""
    with torch.no_grad():
        features = judge(groups.flatten(0, 1))[1].unflatten(0, groups.shape[:2])
    seeds = groups.shape[1]
    distances = torch.cdist(features, features)
    return (distances.sum(dim=(1, 2)) / (seeds * (seeds - 1))).mean().item()
