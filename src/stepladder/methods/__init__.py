"""One file a method; every module here that defines one is discovered by import."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from stepladder.discovery import classes_in


@lru_cache(maxsize=1)
def methods() -> dict[str, Any]:
    """All methods by name: every class of this package's modules that has a `Config`."""
    return {module: kind for module, kind in classes_in(__name__, __path__) if hasattr(kind, "Config")}
