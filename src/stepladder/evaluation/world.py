"""Evaluation on the bundled world: held-out captions, the judge, and every sampler under the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepladder.backbones.base import Backbone
from stepladder.conditioning import Conditioning
from stepladder.data.prompts import encode_prompts
from stepladder.evaluation.metrics import diversity, frechet_distance, prompt_accuracy
from stepladder.progress import progress_bar
from stepladder.resample import resize
from stepladder.samplers import Sampler, sample_many
from stepladder.world.captions import captions
from stepladder.world.judge import Judge, load_judge
from stepladder.world.render import render
from stepladder.world.scenes import Scene, draw_scenes

REFERENCES = 2000
DIVERSITY_CAPTIONS, DIVERSITY_SEEDS = 16, 4


@dataclass
class Exam:
    """Held-out captions with their scenes, encoded, and reference renders; the same for every sampler."""

    scenes: list[Scene]
    prompts: list[str]
    conditioning: Conditioning
    unconditional: Conditioning
    reference: Tensor
    seed: int
    judge: Judge


def set_exam(backbone: Backbone, count: int, seed: int) -> Exam:
    """Draw `count` held-out captions, and reference renders of other held-out scenes; the bundled judge judges."""
    scenes = draw_scenes(count, seed, held_out=True)
    prompts = captions(scenes, seed)
    others = draw_scenes(REFERENCES, seed + 1, held_out=True)
    generator = torch.Generator().manual_seed(seed + 1)
    height, width = backbone.default_size
    reference = torch.cat([render(others[start : start + 100], (height, width), generator) for start in range(0, REFERENCES, 100)])
    unconditional = backbone.unconditional()
    device = unconditional.like.device
    return Exam(scenes, prompts, encode_prompts(backbone, prompts).to(device), unconditional, reference, seed, load_judge())


def enlarge(images: Tensor, exam: Exam) -> Tensor:
    """Pictures as large as the exam's, for the judge knows no other size."""
    return resize(images, tuple(exam.reference.shape[2:]), "bicubic").clamp(-1, 1)


def measure(images: Tensor, exam: Exam) -> dict[str, Any]:
    """Prompt accuracy and FID of images (N, 3, H, W), one a caption of the exam."""
    judge, images = exam.judge, enlarge(images, exam)
    return {
        **prompt_accuracy(judge, images, exam.scenes),
        "fid": frechet_distance(judge, images, exam.reference),
        "samples": len(exam.prompts),
        "seed": exam.seed,
    }


def examine(
    sampler: Sampler, backbone: Backbone, exam: Exam, batch: int = 64, advance: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Figures of one sampler, and its images (N, 3, H, W), one a caption."""
    seeds = [exam.seed * 1_000_000 + index for index in range(len(exam.prompts))]
    drawn = sample_many(sampler, backbone, exam.conditioning, exam.unconditional, seeds, batch, advance=advance)
    picked = [index for index in range(min(DIVERSITY_CAPTIONS, len(exam.prompts))) for _ in range(DIVERSITY_SEEDS)]
    more = [exam.seed * 1_000_000 + 500_000 + number for number in range(len(picked))]
    varied = sample_many(sampler, backbone, exam.conditioning.rows(picked), exam.unconditional, more, batch)
    figures = {
        "nfe": sampler.nfe,
        "seconds_per_image": drawn.seconds_per_image,
        "decode_seconds_per_image": drawn.decode_seconds_per_image,
        **measure(drawn.images, exam),
        "diversity": diversity(exam.judge, enlarge(varied.images, exam).unflatten(0, (-1, DIVERSITY_SEEDS))),
    }
    return figures, drawn.images


def examine_all(
    samplers: dict[str, Sampler], backbone: Backbone, count: int, seed: int, batch: int = 64
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], Exam]:
    """Examine samplers one after another with a progress bar."""
    exam = set_exam(backbone, count, seed)
    figures: dict[str, dict[str, Any]] = {}
    images: dict[str, Tensor] = {}
    with progress_bar() as bar:
        for name, sampler in samplers.items():
            task = bar.add_task(f"sample {name}", total=count, note=f"{sampler.nfe} passes an image")
            figures[name], images[name] = examine(sampler, backbone, exam, batch, lambda n, task=task: bar.advance(task, n))  # type: ignore[misc]
    return figures, images, exam
