"""Scenes: what a picture of the world contains, and which scenes are held out from training."""

from __future__ import annotations

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = ("black", "gray", "cream", "teal")
MAX_OBJECTS = 3


@dataclass(frozen=True)
class Thing:
    """One object: `shape`, `colour`, `size` and `position` are words of the tuples above."""

    shape: str
    colour: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """One to three things, no two at the same position, on a coloured ground."""

    things: tuple[Thing, ...]
    ground: str

    def at(self, position: str) -> Thing | None:
        """The thing at `position`, or None where that quarter of the picture is empty."""
        return next((thing for thing in self.things if thing.position == position), None)


def is_held_out(size: str, colour: str, shape: str) -> bool:
    """Whether a combination belongs to the held-out split.

    A Latin pattern holds out one in six (size, colour, shape) triples: every colour, every shape and both sizes are
    seen in training, and so is every pair of them; these twelve triples never are.
    """
    offset = 0 if size == "small" else 3
    return (COLOURS.index(colour) + SHAPES.index(shape)) % len(COLOURS) == offset


def holds_out(scene: Scene) -> bool:
    """Whether a scene shows at least one held-out combination; training scenes show none."""
    return any(is_held_out(thing.size, thing.colour, thing.shape) for thing in scene.things)


TRIPLES = [(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
TRAIN_TRIPLES = [triple for triple in TRIPLES if not is_held_out(*triple)]
HELD_OUT_TRIPLES = [triple for triple in TRIPLES if is_held_out(*triple)]


def draw_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draw one scene; with `held_out`, its first combination is one that training never shows."""
    positions = rng.sample(POSITIONS, rng.randint(1, MAX_OBJECTS))
    things = []
    for index, position in enumerate(positions):
        pool = TRAIN_TRIPLES if not held_out else HELD_OUT_TRIPLES if index == 0 else TRIPLES
        size, colour, shape = rng.choice(pool)
        things.append(Thing(shape, colour, size, position))
    rng.shuffle(things)
    return Scene(tuple(things), rng.choice(GROUNDS))


def draw_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Draw `count` scenes; the same seed gives the same scenes on every machine."""
    rng = random.Random(f"scenes/{seed}/{held_out}")
    return [draw_scene(rng, held_out) for _ in range(count)]
