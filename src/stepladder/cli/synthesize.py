"""`stepladder synthesize`: teacher samples from prompts into webdataset shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepladder.data.prompts import read_prompts
from stepladder.distillation import load_model, teacher_steps_of
from stepladder.errors import UserError
from stepladder.progress import console
from stepladder.synthesis import Synthesis, process_device, process_share, synthesize
from stepladder.training.recipe import load_recipe


def command(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe: its model draws, at its final size and guidance scale")],
    prompts: Annotated[Path | None, typer.Option(help="TXT, JSONL or CSV; the recipe's data.prompts by default")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder of shards; the recipe's data.images by default")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="only the first so many prompts")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="the teacher's steps; its usual number by default")] = None,
    seed: Annotated[int, typer.Option(help="seed of the pictures' noise")] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures in a shard")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="pictures drawn at a time")] = 16,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override a key of the recipe")] = None,
) -> None:
    """Let the teacher draw training images, one a prompt. Run it again to continue; under torchrun processes share the shards.

    Example: stepladder synthesize recipes/bundled-swd.yaml --prompts prompts.txt --out runs/teacher-images
    """
    loaded = load_recipe(recipe, overrides or [])
    source, folder = prompts or loaded.data.prompts, out or loaded.data.images
    if source is None:
        raise UserError("no prompts: the recipe trains on images; give a text file with --prompts")
    if folder is None:
        raise UserError("no folder for the shards: give one with --out, or set data.images in the recipe")
    texts = read_prompts(source)[:count]
    backbone = load_model(loaded)
    backbone.to(process_device(loaded.training.device))
    size, guidance = loaded.ladder.sizes[-1], loaded.method_config().guidance_scale
    wanted = Synthesis(steps or teacher_steps_of(backbone), guidance, tuple(size), seed, shard_size, loaded.data.negative_prompt)
    drawn = synthesize(backbone, texts, folder, wanted, batch, loaded.training.precision, *process_share())
    console.print(f"{drawn} pictures drawn; {len(texts)} prompts in {folder}; train on them with data.images: {folder}")
