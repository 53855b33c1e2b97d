"""Finding what a package's modules define: nobody keeps a list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator


def classes_in(package: str, path: Iterable[str]) -> Iterator[tuple[str, type]]:
    """Every class that a module of a package defines itself, with the module's short name."""
    for module in pkgutil.iter_modules(path):
        name = f"{package}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and value.__module__ == name:
                yield module.name, value
