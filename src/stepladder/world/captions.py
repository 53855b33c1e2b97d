"""Captions: a small grammar that says a scene in many ways, and its vocabulary."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from stepladder.errors import UserError
from stepladder.world.scenes import COLOURS, GROUNDS, Scene, Thing

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
ROW_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
GROUND_PHRASES = ("on {}", "on a {} ground", "on a {} background", "over {}")
FILLERS = ("a", "and", "on", "over", "ground", "background", "at", "left", "right")

VOCABULARY = sorted(
    {word for group in (SHAPE_WORDS, SIZE_WORDS, ROW_WORDS) for words in group.values() for word in words}
    | set(COLOURS)
    | set(GROUNDS)
    | set(FILLERS)
)


def describe_thing(thing: Thing, rng: random.Random) -> str:
    """Say one thing: "a large red circle top left", "upper right a tiny blue ring", …"""
    row, side = thing.position.split()
    place = f"{rng.choice(ROW_WORDS[row])} {side}"
    noun = f"{rng.choice(SIZE_WORDS[thing.size])} {thing.colour} {rng.choice(SHAPE_WORDS[thing.shape])}"
    form = rng.random()
    if form < 0.4:
        return f"a {noun} {place}"
    if form < 0.7:
        return f"a {noun} at {place}"
    return f"{place} a {noun}"


def describe(scene: Scene, rng: random.Random) -> str:
    """Say a scene; the order of its things, the words and the joints vary with `rng`."""
    things = list(scene.things)
    rng.shuffle(things)
    joint = " and " if rng.random() < 0.7 else ", "
    body = joint.join(describe_thing(thing, rng) for thing in things)
    return f"{body} {rng.choice(GROUND_PHRASES).format(scene.ground)}"


def captions(scenes: list[Scene], seed: int) -> list[str]:
    """One caption a scene; the same seed gives the same words."""
    rng = random.Random(f"captions/{seed}")
    return [describe(scene, rng) for scene in scenes]


def read_caption(caption: str) -> Scene:
    """The scene that a caption says; the inverse of `describe`, but for the order of its things.

    Raises:
        UserError: the caption is not of this world.
    """
    words = re.findall(r"[a-z]+|,", caption)
    ground = next((word for word in reversed(words) if word in GROUNDS), None)
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("and", ","):
            parts.append([])
        else:
            parts[-1].append(word)
    things = [_read_thing(part) for part in parts]
    if ground is None or any(thing is None for thing in things):
        raise UserError(f"the world's judge cannot read {caption!r}: its captions name size, colour, shape and place of each thing")
    return Scene(tuple(thing for thing in things if thing is not None), ground)


def _read_thing(words: list[str]) -> Thing | None:
    def said(meanings: Mapping[str, tuple[str, ...]]) -> str | None:
        return next((meaning for meaning, names in meanings.items() if any(word in names for word in words)), None)

    shape, size, row = said(SHAPE_WORDS), said(SIZE_WORDS), said(ROW_WORDS)
    colour = next((word for word in words if word in COLOURS), None)
    side = next((word for word in words if word in ("left", "right")), None)
    if shape is None or size is None or row is None or colour is None or side is None:
        return None
    return Thing(shape, colour, size, f"{row} {side}")
