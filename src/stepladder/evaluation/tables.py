"""Figures as a table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = {
    "nfe": ("passes", "{:d}"),
    "seconds_per_image": ("ms / image", "{:.1f}"),
    "prompt_accuracy": ("prompts right", "{:.3f}"),
    "shape_accuracy": ("shape", "{:.3f}"),
    "colour_accuracy": ("colour", "{:.3f}"),
    "size_accuracy": ("size", "{:.3f}"),
    "count_accuracy": ("count", "{:.3f}"),
    "ground_accuracy": ("ground", "{:.3f}"),
    "fid": ("FID", "{:.2f}"),
    "diversity": ("diversity", "{:.3f}"),
}

ATTRIBUTES = {f"{name}_accuracy" for name in ("shape", "colour", "size", "count", "ground")}


def cells(row: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    """One sampler's figures as text, with its speedup over the teacher at the end."""
    texts = [form.format(row[key] * (1000 if key == "seconds_per_image" else 1)) for key, (_, form) in COLUMNS.items()]
    return [*texts, f"{teacher['seconds_per_image'] / row['seconds_per_image']:.1f}×"]


def headings() -> list[str]:
    """Column titles after the sampler's name."""
    return [*(title for title, _ in COLUMNS.values()), "speedup"]


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """All samplers, the teacher first; the attributes' own accuracies are left to the report and to JSON."""
    shown = [index for index, key in enumerate(COLUMNS) if key not in ATTRIBUTES]
    any_row = next(iter(figures.values()))
    result = Table(title=f"{any_row['samples']} held-out captions, seed {any_row['seed']}")
    result.add_column("sampler")
    for index in [*shown, -1]:
        result.add_column(headings()[index], justify="right")
    for name, row in figures.items():
        texts = cells(row, figures["teacher"])
        result.add_row(name, *(texts[index] for index in [*shown, -1]))
    return result
