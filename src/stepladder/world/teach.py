"""Teaching from nothing: judge, autoencoder, text encoders, then the transformer at low and at full resolution."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stepladder.errors import UserError
from stepladder.precision import describe, pick_device
from stepladder.storage import check_replaceable, replace_folder, write_text
from stepladder.world.autoencoder import train_autoencoder
from stepladder.world.judge import train_judge
from stepladder.world.phase import taught_seconds
from stepladder.world.teacher import (
    SIZES,
    build_pipeline,
    build_transformer,
    make_captions,
    make_latents,
    scene_of,
    train_transformer,
)
from stepladder.world.text import train_text_encoders

LOW_SHARE = 0.15
HARDEST = "star"  # four in five of the mistakes before this last phase were stars drawn with too few tips
OURS = "teacher/model_index.json"


@dataclass(frozen=True)
class Lessons:
    """How long each phase lasts, in updates, and how many renders the transformer sees."""

    judge: int = 700
    autoencoder: int = 6000
    text: int = 800
    scenes: int = 32000
    low: int = 4000
    full: int = 6500
    polish: int = 8000


def teach(folder: Path, out: Path, lessons: Lessons, seed: int) -> None:
    """Teach everything, with checkpoints in `folder`, and write the finished pipeline and judge to `out`.

    Called again after an interruption it continues where it stopped; finished phases are only loaded.
    """
    out = out.resolve()
    check_replaceable(out, OURS)
    remember(folder / "lessons.json", {**asdict(lessons), "seed": seed})
    judge = train_judge(folder, lessons.judge, seed)
    vae = train_autoencoder(folder, lessons.autoencoder, seed)
    tokenizer, encoders = train_text_encoders(folder, lessons.text, seed)
    scenes = [scene_of(seed, index) for index in range(lessons.scenes)]
    latents = make_latents(folder, vae, scenes, seed)
    text = make_captions(tokenizer, encoders, scenes, seed)
    torch.manual_seed(seed + 1)
    transformer = build_transformer()
    low, full = SIZES
    mostly_full: Callable[[random.Random], int] = lambda rng: low if rng.random() < LOW_SHARE else full
    train_transformer(folder, "low", lambda rng: low, lessons.low, 1.5e-3, transformer, text, latents, seed)
    train_transformer(folder, "full", mostly_full, lessons.full, 1.2e-3, transformer, text, latents, seed)
    hard = [row for row, scene in enumerate(scenes) if any(thing.shape == HARDEST for thing in scene.things)]
    train_transformer(folder, "polish", mostly_full, lessons.polish, 8e-4, transformer, text, latents, seed, favoured=hard)
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline = build_pipeline(vae, tokenizer, encoders, transformer.eval().requires_grad_(False))
    pipeline.to(torch.float16).save_pretrained(str(beside / "teacher"))
    for config in (beside / "teacher").glob("text_encoder*/config.json"):
        # transformers loads what its configuration says and diffusers loads fp32: a plain from_pretrained must not mix them
        write_text(config, config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"'))
    save_file({name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}, str(beside / "judge.safetensors"))
    write_text(beside / "README.md", card(lessons, seed, taught_seconds(folder)))
    replace_folder(beside, out, OURS)


def remember(path: Path, facts: dict[str, Any]) -> None:
    """Write down what a folder of work is for, and refuse to use it for something else.

    Raises:
        UserError: the folder was begun for something else.
    """
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != facts:
        raise UserError(f"{path.parent} was begun with something else ({path}); use that or another --work folder")
    write_text(path, json.dumps(facts))


def card(lessons: Lessons, seed: int, seconds: dict[str, float]) -> str:
    """The model card: what this is, how it was made, on what machine, and how long each phase took."""
    options = " ".join(f"--{name} {value}" for name, value in asdict(lessons).items())
    times = "\n".join(f"| {name} | {spent / 60:.1f} |" for name, spent in seconds.items())
    return f"""# The bundled teacher and its judge

A toy StableDiffusion3Pipeline (128 px; an AutoencoderTiny eight times down; two CLIP text encoders and a silent T5; an MMDiT)
and a convolutional judge, both trained from nothing on the renderer of `stepladder.world`. Weights are stored in half precision.

    stepladder teach --seed {seed} {options}

Machine: {describe(pick_device("auto"))}.

| phase | minutes |
|---|---|
{times}
| in all | {sum(seconds.values()) / 60:.1f} |

Stock diffusers loads it: `StableDiffusion3Pipeline.from_pretrained("teacher")`. Pass `max_sequence_length=1` to a call, which
spares it the 255 further zero tokens of the silent T5; guidance 4 and 28 steps are what it was chosen for.
Licence: Apache-2.0, as the rest of the repository.
"""
