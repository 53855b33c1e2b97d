"""Storage: any tree of tensors and plain values in one safetensors file, written beside and renamed, never pickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepladder.errors import UserError

TREE_KEY = "stepladder.tree"


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON twin of a tree: tensors become references, dictionaries keep keys that are not strings."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, tensors) for item in value]}
    return {"value": value}


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind == "list":
        return [_unpack(item, tensors) for item in content]
    return content


@contextlib.contextmanager
def written_beside(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """A path to write to, which becomes `path` once it is whole and on the disk: readers see the old file or the new one.

    errors: what else the writer raises where it cannot write.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, *errors) as error:  # type: ignore[misc]
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; free some space or choose a folder you may write to") from error


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of dicts, lists, tensors and JSON values; UserError where it cannot be written."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, tensors)
    with written_beside(path, SafetensorError) as beside:
        save_file(tensors, str(beside), metadata={TREE_KEY: json.dumps(packed)})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        UserError: the file is missing, truncated, or not one of ours.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing, truncated or no safetensors file ({error}); use another checkpoint") from error
    if TREE_KEY not in metadata:
        raise UserError(f"{path} is not a Stepladder checkpoint; point at a file that a Stepladder run wrote")
    return _unpack(json.loads(metadata[TREE_KEY]), tensors)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one plain safetensors file; UserError where it cannot be written."""
    with written_beside(path, SafetensorError) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(beside))


def write_text(path: Path, text: str) -> None:
    """Write a text file; UserError where it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; UserError where it cannot be written."""
    with written_beside(path) as beside:
        beside.write_bytes(content)


def replace_folder(beside: Path, folder: Path, ours: str) -> None:
    """Put a finished folder in the place of an older one of ours; at no moment are both missing from the disk.

    Raises:
        UserError: `folder` holds something else than a folder of ours, known by its file `ours`.
    """
    check_replaceable(folder, ours)
    # a name that nobody else has: a user's own backup may well end in .old
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    if folder.exists():
        os.replace(folder, aside / folder.name)
    os.replace(beside, folder)
    shutil.rmtree(aside)


def check_replaceable(folder: Path, ours: str) -> None:
    """Refuse to write over a folder that is neither empty nor of our making."""
    if folder.exists() and not (folder.is_dir() and ((folder / ours).exists() or not any(folder.iterdir()))):
        raise UserError(f"{folder} holds something else; choose a new or empty folder")
