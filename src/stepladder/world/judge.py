"""The judge: a small convolutional network that reads every attribute off a picture, and whose features measure FID."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepladder.errors import UserError
from stepladder.precision import autocast, pick_device
from stepladder.world.paths import JUDGE
from stepladder.world.phase import Phase, run_phase, warm_then_decay
from stepladder.world.render import render
from stepladder.world.scenes import COLOURS, GROUNDS, POSITIONS, SHAPES, SIZES, Scene, draw_scene

IGNORED = -100
FEATURES = 96


def head_sizes() -> list[int]:
    """Widths of the answer's parts: per position (nothing or a shape, colour, size), then the ground."""
    return [len(SHAPES) + 1, len(COLOURS), len(SIZES)] * len(POSITIONS) + [len(GROUNDS)]


def answers(scenes: Sequence[Scene]) -> Tensor:
    """The right answers, (B, 13): per position shape + 1 or 0 for nothing, colour, size (ignored there), then ground."""
    rows = []
    for scene in scenes:
        row: list[int] = []
        for position in POSITIONS:
            thing = scene.at(position)
            if thing is None:
                row += [0, IGNORED, IGNORED]
            else:
                row += [SHAPES.index(thing.shape) + 1, COLOURS.index(thing.colour), SIZES.index(thing.size)]
        rows.append([*row, GROUNDS.index(scene.ground)])
    return torch.tensor(rows)


def answer_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy over the parts of the answer; `logits` (B, sum of head_sizes()), `truth` (B, 13)."""
    parts = logits.split(head_sizes(), dim=-1)
    losses = [F.cross_entropy(part, truth[:, index], ignore_index=IGNORED) for index, part in enumerate(parts)]
    return torch.stack(losses).nanmean()


class Judge(nn.Module):
    """Reads pictures of any size from 64 px up, (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, FEATURES)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(FEATURES, FEATURES, 3, padding=1), nn.GroupNorm(8, FEATURES), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.squeeze = nn.Conv2d(FEATURES, 48, 1)
        self.corner = nn.Sequential(nn.Linear(48 * 16, 128), nn.SiLU(), nn.Linear(128, sum(head_sizes()[:3])))
        self.ground = nn.Linear(FEATURES, len(GROUNDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, sum of head_sizes()) and features (B, FEATURES)."""
        if images.shape[-2:] != (128, 128):
            images = F.interpolate(images, (128, 128), mode="bilinear", antialias=images.shape[-1] > 128)
        grid = self.trunk(images)
        features = grid.mean(dim=(2, 3))
        quarters = self.squeeze(grid).unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        corners = self.corner(quarters).flatten(1)
        return torch.cat([corners, self.ground(features)], dim=-1), features


@lru_cache(maxsize=4)
def load_judge(path: Path = JUDGE) -> Judge:
    """The bundled judge, or another one's weights.

    Raises:
        UserError: the file is missing or no judge's.
    """
    if not path.is_file():
        raise UserError(f"there is no judge at {path}; the bundled one is remade with stepladder teach")
    judge = Judge()
    try:
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(str(path)).items()})
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} holds no judge ({str(error).splitlines()[0]}); give weights that stepladder teach made") from error
    return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of B pictures: `right` (B,) all attributes at once; each attribute's share of right answers."""

    right: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    count: Tensor
    ground: Tensor


def judge_scenes(logits: Tensor, scenes: Sequence[Scene]) -> Verdict:
    """Compare a judge's reading with the scenes asked for.

    Empty positions must be read as empty (`count`); shape, colour and size are asked of the things that are named, and
    an attribute's score is the share of the named things that show it.
    """
    truth = answers(scenes)
    read = torch.stack([part.argmax(dim=-1) for part in logits.split(head_sizes(), dim=-1)], dim=-1)
    asked = truth != IGNORED
    same = (read == truth) | ~asked
    named = (truth[:, 0:12:3] > 0).float()
    share = [(same[:, offset:12:3] * named).sum(1) / named.sum(1) for offset in range(3)]
    there = (read[:, 0:12:3] > 0) == (truth[:, 0:12:3] > 0)
    return Verdict(same.all(dim=1).float(), share[0], share[1], share[2], there.all(dim=1).float(), same[:, 12].float())


def spoil(images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Blur or add noise to pictures a little, so that a judge reads decoded latents as well as clean renders."""
    if rng.random() < 0.5:
        low = rng.choice((48, 64, 96))
        images = F.interpolate(F.interpolate(images, low, mode="area"), images.shape[-1], mode="bilinear")
    if rng.random() < 0.5:
        images = images + rng.random() * 0.15 * torch.randn(images.shape, generator=generator)
    return images


def train_judge(folder: Path, steps: int, seed: int, name: str = "judge") -> Judge:
    """Train a judge on every combination, held-out ones too: it must know what the teacher has to guess."""
    torch.manual_seed(seed)
    device = pick_device("auto")
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"{name}/{seed}/{step}")
        scenes = [draw_scene(rng, held_out=rng.random() < 0.3) for _ in range(48)]
        images = spoil(render(scenes, 128, generator), rng, generator).to(device)
        with autocast(device, "auto"):
            logits, _ = judge(images)
        return answer_loss(logits.float(), answers(scenes).to(device))

    run_phase(Phase(name, {"judge": judge}, [optimizer], steps, loss, warm_then_decay(50, steps), average=0.99), folder, seed)
    return judge.to("cpu").eval().requires_grad_(False)
