"""Prompt files: plain text, JSONL, CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from stepladder.backbones.base import Backbone, Size
from stepladder.conditioning import Conditioning
from stepladder.errors import UserError

PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_prompts(path: Path) -> list[str]:
    """Prompts from TXT (one a line), JSONL or CSV (a column `prompt`, `caption` or `text`).

    Raises:
        UserError: the file is missing, binary, empty or has no such column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read prompts from {path} ({error.strerror}); set data.prompts to a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text; data.prompts takes UTF-8 text with one prompt a line, JSONL or CSV") from error
    if "\0" in text:
        raise UserError(f"{path} is not text; data.prompts takes UTF-8 text with one prompt a line, JSONL or CSV")
    kinds = {".jsonl": _from_jsonl, ".csv": _from_csv}
    prompts = [" ".join(line.split()) for line in kinds.get(path.suffix.lower(), _from_text)(text, path) if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one a line")
    return prompts


def _from_text(text: str, path: Path) -> Iterator[str]:
    yield from text.splitlines()


def _from_jsonl(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield _pick(json.loads(line), path)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON ({error}); mend or remove the line") from error


def _from_csv(text: str, path: Path) -> Iterator[str]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield _pick(row, path)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV table ({error}); mend it, or give one prompt a line in a .txt") from error


def _pick(row: object, path: Path) -> str:
    if isinstance(row, str):
        return row
    for column in PROMPT_COLUMNS:
        if isinstance(row, dict) and isinstance(row.get(column), str):
            return row[column]
    raise UserError(f"{path} has rows without a column named {' or '.join(PROMPT_COLUMNS)}; rename the prompt column")


def encode_prompts(backbone: Backbone, prompts: Sequence[str], size: Size | None = None, batch: int = 64) -> Conditioning:
    """Run the text encoders over prompts, `batch` at a time, for pictures of a final pixel `size`; the result is on the CPU."""
    starts = range(0, len(prompts), batch)
    return Conditioning.cat([backbone.encode(prompts[start : start + batch], size).to("cpu") for start in starts])


class PromptCache:
    """Every prompt encoded once; rows are drawn in a seeded order that depends on the update alone.

    So a resumed run sees the prompts it would have seen, without any position to store.
    """

    def __init__(
        self, conditioning: Conditioning, unconditional: Conditioning, seed: int, texts: Sequence[str] | None = None
    ) -> None:
        self.texts = list(texts or [""] * len(conditioning))
        self.conditioning = conditioning
        self.unconditional = unconditional
        self.seed = seed

    @cached_property
    def digest(self) -> str:
        """A hash of what the text encoders made of the prompts; taken once, for it reads every embedding."""
        digest = hashlib.sha256()
        for name in sorted(self.conditioning.tensors):
            digest.update(self.conditioning.tensors[name].float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows(self, number: int, size: int) -> list[int]:
        """Which prompts a batch has: consecutive places of an endless sequence of shuffled epochs."""
        count = len(self.conditioning)
        return [self._order(place // count)[place % count] for place in range(number * size, (number + 1) * size)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(len(self.conditioning), generator=generator).tolist()
        return self._shuffled
