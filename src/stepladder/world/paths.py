"""Where the bundled teacher and its judge lie."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
TEACHER = BUNDLED / "teacher"
JUDGE = BUNDLED / "judge.safetensors"


def resolve_model(path: str) -> Path:
    """A model's folder; `bundled` is the teacher inside this package."""
    return TEACHER if path == "bundled" else Path(path)
