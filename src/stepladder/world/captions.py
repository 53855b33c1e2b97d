"""Captions: a small grammar that says a scene in many ways, and its vocabulary."""

from __future__ import annotations

import random

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
