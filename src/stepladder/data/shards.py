"""Images and their prompts in webdataset shards: tar files in which members of one stem make one sample."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepladder.errors import UserError
from stepladder.storage import written_beside

PICTURES = ("png", "jpg", "jpeg", "webp")
VIDEOS = ("mp4",)


@dataclass(frozen=True)
class Entry:
    """Where one sample's picture lies, and its prompt."""

    path: Path
    offset: int
    length: int
    kind: str
    prompt: str


class ImageShards:
    """The samples of a folder's shards, in the order of their names; pictures are read when they are asked for.

    Raises:
        UserError: there is no shard, one is damaged, or samples lack a picture or a prompt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("*.tar")) if folder.is_dir() else []
        if not paths:
            raise UserError(f"{folder} holds no .tar shards; make some with stepladder synthesize")
        self.entries = [entry for path in paths for entry in _read_index(path)]
        if not self.entries:
            raise UserError(f"the shards in {folder} hold no pictures; make some with stepladder synthesize")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def prompts(self) -> list[str]:
        """One a sample."""
        return [entry.prompt for entry in self.entries]

    @cached_property
    def digest(self) -> str:
        """A hash of which pictures these are."""
        listing = [[entry.path.name, entry.offset, entry.length] for entry in self.entries]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    def load(self, rows: Sequence[int], size: tuple[int, ...]) -> Tensor:
        """Pictures (B, 3, height, width), or video (B, 3, T, height, width), in [-1, 1], cut and scaled to a pixel `size`."""
        return torch.stack([_decode(self.entries[row], size) for row in rows])


def _read_index(path: Path) -> list[Entry]:
    pictures: dict[str, tuple[int, int, str]] = {}
    prompts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = name.partition(".")
                stem = folder + slash + stem
                if kind in PICTURES + VIDEOS:
                    pictures[stem] = (member.offset_data, member.size, kind)
                elif kind == "txt":
                    content = archive.extractfile(member)
                    prompts[stem] = content.read().decode("utf-8") if content is not None else ""
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"shard {path} is damaged ({error}); remove it and run stepladder synthesize again") from error
    lonely = sorted(set(pictures) ^ set(prompts))
    if lonely:
        raise UserError(f"shard {path}: sample {lonely[0]} needs both a picture and a .txt prompt; mend or remove the shard")
    return [Entry(path, *pictures[stem], prompts[stem]) for stem in pictures]


def _decode(entry: Entry, size: tuple[int, ...]) -> Tensor:
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            content = io.BytesIO(file.read(entry.length))
        if entry.kind in VIDEOS:
            frames = _frames(content, size)
        else:
            frames = [Image.open(content, formats=("PNG", "JPEG", "WEBP")).convert("RGB")]
        fitted = [np.asarray(ImageOps.fit(frame, (size[-1], size[-2]))) for frame in frames]
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"a picture in {entry.path} cannot be read ({error}); make the shard again") from error
    pixels = torch.from_numpy(np.stack(fitted)).float() / 127.5 - 1
    video = pixels.permute(3, 0, 1, 2)
    return video if len(size) == 3 else video[:, 0]


def _frames(content: io.BytesIO, size: tuple[int, ...]) -> list[Image.Image]:
    with av.open(content, "r") as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    wanted = size[0] if len(size) == 3 else 1
    if len(frames) < wanted:
        raise ValueError(f"{len(frames)} frames where {wanted} are needed")
    return frames[:wanted]


def write_shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples, (stem, content by file ending), as one shard: whole or not there; UserError where it cannot be written."""
    with written_beside(path) as beside, tarfile.open(beside, "w") as archive:
        for stem, contents in samples:
            for kind, content in contents.items():
                member = tarfile.TarInfo(f"{stem}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def facts(**values: Any) -> bytes:
    """A sample's JSON member."""
    return json.dumps(values, sort_keys=True).encode()
