"""What tests share: a tiny backbone, a recipe on it, and a generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from stepladder.backbones.base import Backbone
from stepladder.training.recipe import Recipe, parse_recipe

settings.register_profile("stepladder", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("stepladder")


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rungs(backbone: Backbone, *sizes: tuple[int, int]) -> list[tuple[int, ...]]:
    """Pixel sizes as a backbone takes them: five frames of each where it makes video."""
    return [(5, *size) if len(backbone.default_size) == 3 else size for size in sizes]


def some_state(backbone: Backbone, generator: torch.Generator, batch: int = 2) -> torch.Tensor:
    """Latents of noise at 32 px."""
    size = backbone.latent_size(rungs(backbone, (32, 32))[0])
    return torch.randn(batch, backbone.latent_channels, *size, generator=generator)


def recipe_for(backbone: Backbone, folder: Path, **training: object) -> Recipe:
    """The tiny recipe with sizes and text length that fit a backbone."""
    recipe = tiny_recipe(folder, **training)
    recipe.ladder.sizes = rungs(backbone, (16, 16), (32, 32))
    recipe.model.max_sequence_length = backbone.max_sequence_length
    return recipe


def tiny_recipe(folder: Path, **training: object) -> Recipe:
    """A recipe for tiny backbones: 16 px then 32 px, two prompts."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green star\n", encoding="utf-8")
    return parse_recipe(
        {
            "model": {"path": "bundled", "max_sequence_length": 4},
            "ladder": {"sizes": [[16, 16], [32, 32]], "steps": 4, "spacing": 3.0, "thresholds": [-2.5]},
            "method": {"name": "rmd", "warmup_steps": 1},
            "roles": {"mode": "lora", "lora_rank": 4},
            "data": {"prompts": str(prompts)},
            "training": {
                "updates": 4,
                "batch_size": 2,
                "student_learning_rate": 1e-3,
                "fake_score_learning_rate": 1e-3,
                "precision": "fp32",
                "checkpoint_every": 2,
                "sample_every": 100,
                "device": "cpu",
                **training,
            },
        }
    )
