"""One file a backbone; every module here that defines one is discovered by import."""

from __future__ import annotations

import importlib
import json
import pkgutil
from functools import lru_cache
from pathlib import Path

from stepladder.backbones.base import Backbone
from stepladder.errors import UserError


@lru_cache(maxsize=1)
def backbones() -> dict[str, type[Backbone]]:
    """All backbones by name: every class of this package's modules that names the pipeline it wraps."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and hasattr(value, "pipeline_class") and hasattr(value, "name") and value is not Backbone:
                found[value.name] = value
    return found


def load_backbone(path: str | Path, max_sequence_length: int = 256) -> Backbone:
    """Load the diffusers pipeline at `path` with the backbone that knows its class.

    Raises:
        UserError: no pipeline there, or one that no backbone knows.
    """
    index = Path(path) / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path} is no diffusers pipeline (it has no model_index.json); point at a pipeline's folder")
    try:
        wanted = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{index} is not readable JSON ({error}); download the model again") from error
    for backbone in backbones().values():
        if backbone.pipeline_class == wanted:
            return backbone.load(path, max_sequence_length)
    known = ", ".join(sorted(backbone.pipeline_class for backbone in backbones().values()))
    raise UserError(f"{path} is a {wanted}, which no backbone knows; known pipelines: {known}")
