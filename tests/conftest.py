"""What tests share: a tiny backbone, a recipe on it, and a generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from stepladder.backbones.base import Backbone
from stepladder.data.shards import write_shard
from stepladder.images import png_bytes, save_video
from stepladder.methods import methods
from stepladder.training.recipe import Recipe, parse_recipe

settings.register_profile("stepladder", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("stepladder")


THREADS = min(2, torch.get_num_threads())


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


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


def method_recipe(method: str, backbone: Backbone, folder: Path, settings: dict[str, object] | None = None) -> Recipe:
    """The tiny recipe with a method, and with images where the method's terms need some."""
    recipe = recipe_for(backbone, folder)
    kind = methods()[method]
    config = kind.Config.model_validate({"name": method, **(settings or {})})
    recipe.method = config.model_dump(mode="json")
    if kind.wants_images(config):
        recipe.data.prompts, recipe.data.images = None, some_shards(backbone, folder / "images")
    return recipe


def some_shards(backbone: Backbone, folder: Path, count: int = 3) -> Path:
    """A shard of random pictures, or of video where the backbone makes video, at 32 px."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        content = {"txt": f"a thing number {index}".encode()}
        if len(backbone.default_size) == 3:
            save_video(torch.rand(3, 9, 32, 32, generator=draw) * 2 - 1, folder / "one.mp4")
            content["mp4"] = (folder / "one.mp4").read_bytes()
        else:
            content["png"] = png_bytes(torch.rand(3, 32, 32, generator=draw) * 2 - 1)
        samples.append((f"{index:06d}", content))
    write_shard(folder / "000000.tar", samples)
    return folder


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
