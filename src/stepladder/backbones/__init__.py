"""One file a backbone; every module here that defines one is discovered by import."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from stepladder.backbones.base import Backbone, Release
from stepladder.backbones.loading import locate, read_blueprint, read_json, read_single_file
from stepladder.discovery import classes_in
from stepladder.errors import UserError


@lru_cache(maxsize=1)
def backbones() -> dict[str, type[Backbone]]:
    """All backbones by name: every class of this package's modules that names the pipeline it wraps."""
    kinds = (kind for _, kind in classes_in(__name__, __path__) if issubclass(kind, Backbone) and kind is not Backbone)
    return {kind.name: kind for kind in kinds}


def releases() -> dict[str, tuple[type[Backbone], Release]]:
    """All published models that some backbone knows without weights, by their short name."""
    return {name: (kind, release) for kind in backbones().values() for name, release in kind.releases.items()}


def backbone_of(pipeline_class: str, path: str | Path) -> type[Backbone]:
    """The backbone that wraps a pipeline class.

    Raises:
        UserError: none does; those known are listed.
    """
    for backbone in backbones().values():
        if backbone.pipeline_class == pipeline_class:
            return backbone
    known = ", ".join(sorted(backbone.pipeline_class for backbone in backbones().values()))
    raise UserError(f"{path} is a {pipeline_class}, which no backbone knows; known pipelines: {known}")


def load_backbone(
    path: str | Path,
    max_sequence_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str | Path | None = None,
) -> Backbone:
    """Load the diffusers pipeline at `path`, a folder or a hub id, with the backbone that knows its class.

    Args:
        weights: a fine-tune in one safetensors file, whose denoiser takes the place of the pipeline's.

    Raises:
        UserError: no pipeline there, one that no backbone knows, or weights that are not for it.
    """
    folder = locate(path)
    index = read_json(folder / "model_index.json")
    backbone = backbone_of(str(index.get("_class_name")), path).load(path, max_sequence_length, dtype)
    if weights is not None:
        backbone.network = read_single_file(backbone.network, Path(weights), folder, backbone.denoiser, dtype)
    return backbone


def sketch_backbone(
    name: str | Path,
    max_sequence_length: int | None = None,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """A model without its weights: a release by its short name or hub id, a folder, or another hub id.

    Raises:
        UserError: neither of these.
    """
    for short, (kind, release) in releases().items():
        if str(name) in (short, release.hub_id):
            return kind.sketch(release.blueprint, release.hub_id, max_sequence_length, device, dtype)
    kind_name, blueprint = read_blueprint(locate(name))
    return backbone_of(kind_name, name).sketch(blueprint, str(name), max_sequence_length, device, dtype)
