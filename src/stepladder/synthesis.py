"""Teacher samples as webdataset shards: what SwD trains on, and what GAN and MMD terms compare with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.data.prompts import encode_prompts
from stepladder.data.shards import facts, write_shard
from stepladder.errors import UserError
from stepladder.fingerprint import fingerprint
from stepladder.images import png_bytes, save_video
from stepladder.ladder import full_resolution
from stepladder.precision import pick_device
from stepladder.progress import console, progress_bar
from stepladder.roles import Role
from stepladder.samplers import Sampler, sample_many
from stepladder.storage import write_text

FACTS_FILE = "synthesis.json"


@dataclass(frozen=True)
class Synthesis:
    """How the teacher draws: its steps and guidance, the pixel size, and how many pictures a shard holds."""

    steps: int
    guidance_scale: float
    size: tuple[int, ...]
    seed: int = 0
    shard_size: int = 256
    negative_prompt: str = ""


def synthesize(
    backbone: Backbone,
    prompts: Sequence[str],
    folder: Path,
    wanted: Synthesis,
    batch: int = 16,
    precision: str = "auto",
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Draw one picture a prompt into `folder`, shard after shard; shards that are there already are kept.

    A shard appears under its name only when it is whole. Each picture has its own seed, so the shards do not depend on how
    many processes share them: process `rank` of `world_size` draws every `world_size`-th.

    Returns:
        The number of pictures drawn by this call.

    Raises:
        UserError: the folder holds shards of another teacher, other prompts or other settings.
    """
    _claim(folder, backbone, prompts, wanted)
    starts = list(range(0, len(prompts), wanted.shard_size))[rank::world_size]
    missing = [start for start in starts if not _shard(folder, start, wanted).exists()]
    kept = len(starts) - len(missing)
    if kept:
        console.print(f"{kept} of {len(starts)} shards are there already")
    if not missing:
        return 0
    network = backbone.network
    ladder = full_resolution(backbone.teacher_timesteps(wanted.steps), backbone.latent_size(wanted.size))
    sampler = Sampler(Role(backbone, network), ladder, wanted.guidance_scale)
    device = next(network.parameters()).device
    unconditional = backbone.unconditional(wanted.negative_prompt, wanted.size).to(device)
    done = 0
    with progress_bar() as bar:
        total = sum(min(wanted.shard_size, len(prompts) - start) for start in missing)
        task = bar.add_task("synthesize", total=total, note=f"{sampler.nfe} passes an image")
        for start in missing:
            rows = range(start, min(start + wanted.shard_size, len(prompts)))
            texts = [prompts[row] for row in rows]
            conditioning = encode_prompts(backbone, texts, wanted.size).to(device)
            seeds = [wanted.seed * 1_000_000_007 + row for row in rows]
            drawn = sample_many(
                sampler, backbone, conditioning, unconditional, seeds, batch, precision, lambda n: bar.advance(task, n)
            )
            samples = [
                (f"{row:09d}", _members(image, text, seed))
                for row, image, text, seed in zip(rows, drawn.images, texts, seeds, strict=True)
            ]
            write_shard(_shard(folder, start, wanted), samples)
            done += len(samples)
            if not console.is_terminal:
                console.print(f"{done} of {total} pictures")
    return done


def _shard(folder: Path, start: int, wanted: Synthesis) -> Path:
    return folder / f"{start // wanted.shard_size:06d}.tar"


def _members(image: Tensor, prompt: str, seed: int) -> dict[str, bytes]:
    picture = {"mp4": _mp4_bytes(image)} if image.ndim == 4 else {"png": png_bytes(image)}
    return {**picture, "txt": prompt.encode(), "json": facts(prompt=prompt, seed=seed)}


def _mp4_bytes(video: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_video(video, Path(folder) / "video.mp4")
        return (Path(folder) / "video.mp4").read_bytes()


def _claim(folder: Path, backbone: Backbone, prompts: Sequence[str], wanted: Synthesis) -> None:
    own: dict[str, Any] = {
        **asdict(wanted),
        "size": list(wanted.size),
        "model": fingerprint(backbone.network),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "count": len(prompts),
    }
    path = folder / FACTS_FILE
    others = [entry for entry in folder.iterdir() if not entry.name.startswith(FACTS_FILE)] if folder.is_dir() else []
    if not path.exists() and (others or (folder.exists() and not folder.is_dir())):
        raise UserError(f"{folder} is not empty and holds no synthesis; choose another folder")
    if not path.exists():
        # processes that start together each write the same beside, under names of their own, and the first to link it wins
        mine = path.with_name(f"{FACTS_FILE}.{os.getpid()}.{threading.get_ident()}")
        write_text(mine, json.dumps(own, indent=2))
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
        mine.unlink()
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, value in own.items():
        if found.get(key) != value:
            raise UserError(f"{folder} was made with another {key}; continue it with the same one or choose another folder")


def process_share() -> tuple[int, int]:
    """Rank and world size as torchrun sets them; 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def process_device(choice: str) -> torch.device:
    """The recipe's device; of several cards, the one that torchrun gives this process."""
    device = pick_device(choice)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device == torch.device("cuda") else device
