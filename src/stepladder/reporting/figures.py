"""Figures that are drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stepladder.storage import write_bytes


def spectrum_figure(result: dict[str, Any], path: Path) -> None:
    """Power over frequency of clean latents, of noise and of noised latents, with the proposed sizes as upright lines."""
    spectra = result["spectra"]
    figure = Figure(figsize=(6.4 * len(spectra), 4.4), layout="constrained")
    for place, (name, spectrum) in enumerate(spectra.items()):
        axes = figure.add_subplot(1, len(spectra), place + 1)
        frequencies = spectrum["frequencies"][1:]
        axes.plot(frequencies, spectrum["clean"][1:], color="#6b4fa0", linewidth=2, label="clean latents")
        axes.axhline(1.0, color="#3b74b8", linewidth=2, label="noise")
        for number, (timestep, power) in enumerate(spectrum["noised"].items()):
            axes.plot(
                frequencies, power[1:], color="#c8702a", alpha=1 - 0.7 * number / len(spectrum["noised"]), label=f"t = {timestep}"
            )
        full = result["latent_size"][0 if name == "time" else -2]
        for step in result["steps"][:-1]:
            share = step["size"][0 if name == "time" else -2] / full
            if share < 1:
                axes.axvline(share / 2, color="#888888", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=f"cycles a latent {'frame' if name == 'time' else 'pixel'}", ylabel="power")
        axes.set_title(f"spectrum over {name}; dotted: where a proposed size ends")
        axes.legend(fontsize=8, frameon=False)
    write_bytes(path, png_of(figure))


def curves_figure(result: dict[str, Any], titles: Mapping[str, str]) -> Figure:
    """The course of a study's drawn figures over updates: a line a series, mean and deviation over seeds; other rows dotted."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["series"]:
            lines.setdefault(row["series"], []).append(row)
    others = [row for row in result["rows"] if not row["series"]]
    figure = Figure(figsize=(4.6 * len(result["drawn"]), 3.4), layout="constrained")
    for place, name in enumerate(result["drawn"]):
        axes = figure.add_subplot(1, len(result["drawn"]), place + 1)
        for series, rows in lines.items():
            axes.errorbar(
                [row["after"] for row in rows],
                [row[name]["mean"] for row in rows],
                [row[name]["spread"] for row in rows],
                marker="o",
                capsize=3,
                label=series,
            )
        for number, row in enumerate(others):
            axes.axhline(row[name]["mean"], linestyle=":", color=str(0.3 + 0.3 * number), label=row["name"])
        axes.set(xlabel="updates", title=titles[name])
        axes.legend(fontsize=8, frameon=False)
    return figure


def png_of(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()
