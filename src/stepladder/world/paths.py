"""Where the bundled teacher and its judge lie."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
TEACHER = BUNDLED / "teacher"
JUDGE = BUNDLED / "judge.safetensors"


def resolve_model(path: str) -> str:
    """A model's folder or hub id; `bundled` is the teacher inside this package."""
    return str(TEACHER) if path == "bundled" else path
