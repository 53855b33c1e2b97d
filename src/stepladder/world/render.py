"""The renderer: scenes to pictures, vectorised, at any resolution, with everything a caption does not say drawn at random.

Shapes are signed distance functions in units of the picture's width; anti-aliasing is the distance measured in pixels, so
the same scene and seed give the same picture at every resolution, only finer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepladder.world.scenes import COLOURS, GROUNDS, MAX_OBJECTS, SHAPES, Scene

COLOUR_RGB = torch.tensor(
    [[0.86, 0.16, 0.16], [0.16, 0.62, 0.22], [0.16, 0.32, 0.88], [0.95, 0.83, 0.16], [0.56, 0.20, 0.72], [0.96, 0.52, 0.10]]
)
GROUND_RGB = torch.tensor([[0.09, 0.09, 0.11], [0.52, 0.53, 0.55], [0.93, 0.89, 0.79], [0.12, 0.43, 0.46]])
RADIUS = {"small": 0.12, "large": 0.19}
ROTATION = {"circle": math.pi, "square": 0.30, "triangle": 0.35, "star": 0.60, "ring": math.pi, "cross": 0.30}


def scene_parameters(scenes: Sequence[Scene], generator: torch.Generator) -> dict[str, Tensor]:
    """Place every thing of every scene: jitter, rotation, light and texture that captions leave open.

    Returns tensors of shape (B, MAX_OBJECTS) per thing and (B, …) per picture; absent things have radius 0.
    """
    batch = len(scenes)
    rand = torch.rand(batch, MAX_OBJECTS, 5, generator=generator)
    picture = torch.rand(batch, 10, generator=generator)
    shape = torch.zeros(batch, MAX_OBJECTS, dtype=torch.long)
    colour = torch.zeros(batch, MAX_OBJECTS, dtype=torch.long)
    radius = torch.zeros(batch, MAX_OBJECTS)
    centre = torch.zeros(batch, MAX_OBJECTS, 2)
    swing = torch.zeros(batch, MAX_OBJECTS)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            shape[row, column] = SHAPES.index(thing.shape)
            colour[row, column] = COLOURS.index(thing.colour)
            radius[row, column] = RADIUS[thing.size]
            centre[row, column, 0] = 0.27 if thing.position.endswith("left") else 0.73
            centre[row, column, 1] = 0.27 if thing.position.startswith("top") else 0.73
            swing[row, column] = ROTATION[thing.shape]
    return {
        "shape": shape,
        "colour": colour,
        "radius": radius * (0.92 + 0.16 * rand[..., 0]),
        "centre": centre + 0.07 * (rand[..., 1:3] - 0.5),
        "angle": swing * (2 * rand[..., 3] - 1),
        "tint": 0.12 * (rand[..., 4] - 0.5),
        "ground": torch.tensor([GROUNDS.index(scene.ground) for scene in scenes]),
        "picture": picture,
    }


def _polygon_star(x: Tensor, y: Tensor, points: int, inner: float) -> Tensor:
    """Distance to a star of `points` tips of radius 1 and notches of radius `inner`, by folding the plane."""
    half = math.pi / points
    angle = torch.remainder(torch.atan2(x, -y) + half, 2 * half) - half
    length = torch.sqrt(x * x + y * y + 1e-12)
    px, py = length * torch.sin(angle.abs()), length * torch.cos(angle)
    ex, ey = inner * math.sin(half), inner * math.cos(half) - 1.0
    norm = math.hypot(ex, ey)
    return (px * -ey + (py - 1.0) * ex) / norm


OUTLINES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.sqrt(x * x + y * y + 1e-12) - 0.92,
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    lambda x, y: torch.maximum(x.abs() * 0.866 - y * 0.5, y) - 0.52,
    lambda x, y: _polygon_star(x, y, 5, 0.45),
    lambda x, y: (torch.sqrt(x * x + y * y + 1e-12) - 0.74).abs() - 0.24,
    lambda x, y: torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.34, torch.maximum(x.abs(), y.abs()) - 0.98),
)


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance, in units of the radius, to each thing's outline: negative inside.

    Args:
        shape: (B,) indices into SHAPES.
        x, y: (B, 1, H, W) in the thing's own frame.
    """
    distance = torch.empty_like(x)
    for index, outline in enumerate(OUTLINES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            distance[rows] = outline(x[rows], y[rows])
    return distance


def _ground(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The ground, (B, 3, H, W): its colour under a soft slope of light, with faint wavy stripes."""
    draw = parameters["picture"][:, :, None, None]
    colour = GROUND_RGB[parameters["ground"]][:, :, None, None]
    turn = 2 * math.pi * draw[:, 0:1]
    slope = (torch.cos(turn) * (x - 0.5) + torch.sin(turn) * (y - 0.5)) * (0.10 + 0.18 * draw[:, 1:2])
    lean = math.pi * draw[:, 2:3]
    along = torch.cos(lean) * x + torch.sin(lean) * y
    across = torch.cos(lean) * y - torch.sin(lean) * x
    bend = 0.03 * torch.sin(2 * math.pi * (2.0 * across + draw[:, 3:4]))
    stripes = torch.sin(2 * math.pi * ((5 + 5 * draw[:, 4:5]) * (along + bend) + draw[:, 5:6]))
    return colour * (1 + slope) + 0.022 * stripes + 0.5 * slope * 0.12


def render(scenes: Sequence[Scene], size: int | tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw scenes as pictures.

    Args:
        scenes: B scenes.
        size: side in pixels, or (height, width).
        generator: draws what captions leave open (jitter, rotation, light, texture).

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    height, width = (size, size) if isinstance(size, int) else size
    parameters = scene_parameters(scenes, generator)
    x = ((torch.arange(width) + 0.5) / width)[None, None, None, :]
    y = ((torch.arange(height) + 0.5) / height)[None, None, :, None]
    image = _ground(parameters, x, y)
    light = 2 * math.pi * parameters["picture"][:, 6, None, None, None]
    for column in range(MAX_OBJECTS):
        image = _draw_thing(image, parameters, column, light, x, y)
    return (image.clamp(0, 1) * 2 - 1).contiguous()


def _draw_thing(image: Tensor, parameters: dict[str, Tensor], column: int, light: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Lay one thing of every picture over `image`: a soft shadow away from the light, then the shaded body."""
    take = {name: parameters[name][:, column] for name in ("shape", "colour", "radius", "angle", "tint")}
    centre = parameters["centre"][:, column]
    radius = take["radius"][:, None, None, None]
    here = radius > 0
    unit = radius.clamp(min=1e-3)
    cos, sin = torch.cos(take["angle"])[:, None, None, None], torch.sin(take["angle"])[:, None, None, None]
    shape = take["shape"]

    def local(dx: Tensor | float, dy: Tensor | float) -> tuple[Tensor, Tensor]:
        u, v = (x - centre[:, 0, None, None, None] - dx) / unit, (y - centre[:, 1, None, None, None] - dy) / unit
        return cos * u + sin * v, cos * v - sin * u

    shadow = _distance(shape, *local(-0.022 * torch.cos(light), -0.022 * torch.sin(light))) * unit
    dark = torch.sigmoid(-shadow / 0.010) * 0.38 * here
    image = image * (1 - dark)
    distance = _distance(shape, *local(0.0, 0.0)) * unit
    cover = (0.5 - distance * image.shape[-1]).clamp(0, 1) * here
    u, v = (x - centre[:, 0, None, None, None]) / unit, (y - centre[:, 1, None, None, None]) / unit
    toward = torch.cos(light) * u + torch.sin(light) * v
    shade = 1 + 0.20 * toward + take["tint"][:, None, None, None]
    gloss = 0.22 * torch.exp(-((u - 0.4 * torch.cos(light)) ** 2 + (v - 0.4 * torch.sin(light)) ** 2) / 0.12)
    rim = torch.exp(-((distance / unit) ** 2) / 0.012) * 0.16
    body = COLOUR_RGB[take["colour"]][:, :, None, None] * (shade - rim) + gloss
    return image * (1 - cover) + body * cover
