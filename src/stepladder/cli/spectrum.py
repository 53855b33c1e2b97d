"""`stepladder spectrum`: what noise hides in a model's latents, and the ladder that follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from stepladder.data.shards import ImageShards
from stepladder.distillation import load_model
from stepladder.errors import UserError
from stepladder.precision import pick_device
from stepladder.reporting.figures import spectrum_figure
from stepladder.spectrum import LEAST, MASKED, Proposal, propose, radial_spectrum, temporal_spectrum
from stepladder.storage import write_text
from stepladder.training.recipe import Recipe, load_recipe


def command(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe: its model, final size and timesteps are looked at")],
    images: Annotated[Path | None, typer.Option(help="a folder of shards; the recipe's data.images by default")] = None,
    out: Annotated[Path, typer.Option(help="folder for spectrum.json and spectrum.png")] = Path("runs/spectrum"),
    count: Annotated[int, typer.Option(min=1, help="at most so many images")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="images encoded at a time")] = 16,
    masked: Annotated[
        float, typer.Option(min=0.0, help="a frequency is hidden where the image's power is at most this share of the noise's")
    ] = MASKED,
    least: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of the full side below which no step goes")] = LEAST,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override a key of the recipe")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Measure the power spectrum of latents, noise it along the schedule, and propose the smallest ladder that loses nothing.

    Example: stepladder spectrum recipes/bundled-swd.yaml --images runs/teacher-images
    """
    loaded = load_recipe(recipe, overrides or [])
    folder = images or loaded.data.images
    if folder is None:
        raise UserError("no images: give a folder of shards with --images; stepladder synthesize makes some")
    result, steps = _measure(loaded, folder, count, batch, masked, least)
    write_text(out / "spectrum.json", json.dumps(result, indent=2))
    spectrum_figure(result, out / "spectrum.png")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(_table(result, steps))
    console.print(
        "as a recipe's ladder:\n" + yaml.safe_dump({"ladder": result["ladder"]}, sort_keys=False, default_flow_style=None)
    )
    console.print(f"figure: {out / 'spectrum.png'}   figures: {out / 'spectrum.json'}")


def _measure(
    recipe: Recipe, folder: Path, count: int, batch: int, masked: float, least: float
) -> tuple[dict[str, Any], list[Proposal]]:
    backbone = load_model(recipe)
    device = pick_device(recipe.training.device)
    backbone.to(device)
    shards, full = ImageShards(folder), backbone.latent_size(tuple(recipe.ladder.sizes[-1]))
    rows = range(min(count, len(shards)))
    pixels = backbone.pixel_size(full)
    parts = [shards.load(rows[start : start + batch], pixels) for start in range(0, len(rows), batch)]
    latents = torch.cat([backbone.encode_images(part.to(device)).cpu() for part in parts])
    spatial = radial_spectrum(latents)
    temporal = temporal_spectrum(latents) if latents.ndim == 5 else None
    timesteps = [step.teacher_timestep for step in recipe.ladder.build(backbone).steps]
    steps = propose(spatial, temporal, backbone.process, timesteps, full, backbone.patch_size, masked, least)
    kinds = {"space": spatial} | ({"time": temporal} if temporal is not None else {})
    distinct = list(dict.fromkeys(step.size for step in steps))
    result = {
        "images": len(rows),
        "latent_size": list(full),
        "masked": masked,
        "spectra": {
            name: {
                "frequencies": spectrum.frequencies,
                "clean": spectrum.power,
                "noised": {f"{t:.0f}": spectrum.noised(backbone.process, t) for t in timesteps},
            }
            for name, spectrum in kinds.items()
        },
        "steps": [
            {"timestep": s.timestep, "safe_scale": s.safe_scale, "safe_frames": s.safe_frames, "size": s.size} for s in steps
        ],
        "ladder": {
            "sizes": [list(backbone.pixel_size(size)) for size in distinct],
            "timesteps": [round(t, 1) for t in timesteps],
            "allocation": [sum(step.size == size for step in steps) for size in distinct],
            "shift": recipe.ladder.shift,
        },
    }
    return result, steps


def _table(result: dict[str, Any], steps: list[Proposal]) -> Table:
    table = Table(title=f"{result['images']} images, latents of {'x'.join(map(str, result['latent_size']))}")
    video = "time" in result["spectra"]
    for title in ("timestep", "smallest safe share of the side", *(["of the frames"] if video else []), "proposed latent size"):
        table.add_column(title, justify="right")
    for step in steps:
        more = [f"{step.safe_frames:.2f}"] if video else []
        table.add_row(f"{step.timestep:.0f}", f"{step.safe_scale:.2f}", *more, "x".join(map(str, step.size)))
    return table
