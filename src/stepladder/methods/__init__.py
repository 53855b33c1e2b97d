"""One file a method; every module here that defines one is discovered by import."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def methods() -> dict[str, Any]:
    """All methods by name: every class of this package's modules that has a `Config`."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and hasattr(value, "Config") and value.__module__.endswith(f".{module.name}"):
                found[module.name] = value
    return found
