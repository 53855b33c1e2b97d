"""Figures that are drawn with matplotlib, written beside and renamed."""

from __future__ import annotations

import io
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
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG beside and rename it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_bytes(path, content.getvalue())
