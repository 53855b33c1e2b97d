"""Metrics of a run: a JSONL file always, and tensorboard beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from stepladder.errors import UserError
from stepladder.storage import write_text


class MetricLog:
    """Appends one JSON object an update; a resumed run first drops what was written past its checkpoint."""

    def __init__(self, folder: Path, update: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _update_of(line) <= update]
            write_text(self.path, "".join(line + "\n" for line in kept))
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}; free some space, then --resume") from error

    def write(self, update: int, figures: dict[str, float]) -> None:
        """Log the figures of one update."""
        with self._explained():
            self.file.write(json.dumps({"update": update, **{name: round(value, 6) for name, value in figures.items()}}) + "\n")
            for name, value in figures.items():
                self.board.add_scalar(name, value, update)

    def flush(self) -> None:
        """Hand everything to the disk."""
        with self._explained():
            self.file.flush()
            self.board.flush()

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        self.board.close()


def _update_of(line: str) -> float:
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """A run's figures, one dict an update."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.exists() else []
