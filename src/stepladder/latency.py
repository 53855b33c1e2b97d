"""Latency of teacher, full-resolution few-step and ladder, side by side on random weights: it does not depend on weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import diffusers
import torch

from stepladder.backbones.base import Backbone
from stepladder.errors import UserError
from stepladder.ladder import Ladder, full_resolution
from stepladder.precision import machine, synchronize
from stepladder.progress import progress_bar
from stepladder.roles import Role
from stepladder.samplers import Sampler, sample


@dataclass(frozen=True)
class LatencySetup:
    """What is timed and how: batch sizes, medians of `rounds` after `warmup` runs, options that speed things up."""

    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    warmup: int = 1
    compile: bool = False
    tiny_vae: bool = False
    precision: str = "fp32"


def timed(work: Callable[[], Any], device: torch.device, rounds: int, warmup: int) -> dict[str, float]:
    """Median and extremes of the seconds that `work` takes."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def with_tiny_vae(backbone: Backbone, device: torch.device) -> None:
    """Put a TAESD-sized decoder in the VAE's place, as SwD's appendix G times it.

    Raises:
        UserError: the model makes video, for which there is none.
    """
    if len(backbone.default_size) == 3:
        raise UserError("there is no tiny VAE for video in diffusers; leave out --tiny-vae")
    vae = diffusers.AutoencoderTiny(latent_channels=backbone.latent_channels)
    backbone.pipeline.vae = vae.to(device, backbone.network.dtype).eval().requires_grad_(False)


def measure(backbone: Backbone, ladder: Ladder, teacher_steps: int, guidance_scale: float, setup: LatencySetup) -> dict[str, Any]:
    """Time the three samplers, the text encoders and the decoder.

    Args:
        backbone: with its weights, random or real, on the device to time.
        ladder: the student's.

    Returns:
        seconds a batch for each part and batch size, and the ladder's speedups; plain values.
    """
    device = next(backbone.network.parameters()).device
    if setup.tiny_vae:
        with_tiny_vae(backbone, device)
    network: Any = torch.compile(backbone.network) if setup.compile else backbone.network
    role = Role(backbone, network)
    full = full_resolution([step.teacher_timestep for step in ladder.steps], ladder.size)
    teacher = full_resolution(backbone.teacher_timesteps(teacher_steps), ladder.size)
    samplers = {"teacher": Sampler(role, teacher, guidance_scale), "full": Sampler(role, full), "ladder": Sampler(role, ladder)}
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        task = bar.add_task("latency", total=len(setup.batches) * (len(samplers) + 2), note="")
        for batch in setup.batches:
            work = {name: _sampling(sampler, backbone, batch, setup.precision) for name, sampler in samplers.items()}
            work["text_encoders"] = lambda batch=batch: _read(backbone, batch)  # type: ignore[misc]
            work["decode"] = _decoding(backbone, ladder, batch)
            row: dict[str, Any] = {"batch": batch}
            for name, part in work.items():
                row[name] = timed(part, device, setup.rounds, setup.warmup)
                bar.advance(task)
            row["speedup_over_teacher"] = row["teacher"]["median"] / row["ladder"]["median"]
            row["speedup_over_full_resolution"] = row["full"]["median"] / row["ladder"]["median"]
            rows.append(row)
    return {"rows": rows, "teacher_steps": teacher_steps, "allocation": ladder.allocation(), **facts(device, setup)}


def _sampling(sampler: Sampler, backbone: Backbone, batch: int, precision: str) -> Callable[[], Any]:
    device = next(backbone.network.parameters()).device
    conditioning, unconditional = (backbone.blank_conditioning(count, device) for count in (batch, 1))
    return lambda: sample(sampler, backbone, conditioning, unconditional, list(range(batch)), precision)


def _read(backbone: Backbone, batch: int) -> None:
    with torch.no_grad():
        for encoder in backbone.text_encoders:
            tokens = min(
                backbone.max_sequence_length, getattr(encoder.config, "max_position_embeddings", backbone.max_sequence_length)
            )
            encoder(torch.zeros(batch, tokens, dtype=torch.long, device=next(encoder.parameters()).device))


def _decoding(backbone: Backbone, ladder: Ladder, batch: int) -> Callable[[], Any]:
    device = next(backbone.network.parameters()).device
    latents = torch.zeros(batch, backbone.latent_channels, *ladder.size, device=device)
    return lambda: [backbone.decode(latent[None]) for latent in latents]


def facts(device: torch.device, setup: LatencySetup) -> dict[str, Any]:
    """Date, card, versions and options: what a figure of latency is worth nothing without."""
    peak = {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {
        "date": date.today().isoformat(),
        "device": machine(device),
        "versions": {name: version(name).split("+")[0] for name in ("torch", "diffusers")},
        "options": dict(vars(setup)),
        **peak,
    }


def medians(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A row's medians in milliseconds, as text."""
    return [f"{1000 * row[name]['median']:.1f}" for name in names]
