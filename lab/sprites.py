"""sprites: small pictures of shapes, drawn on the fly, the same on every machine.

`draw` makes pictures and labels for one of the tasks: six shapes to pre-train on, six others among
small dots to adapt to. Our stand-in for VTAB-1k's structured tasks [us].
"""

import math

import torch
from torch import Tensor

TASKS = ("shape", "location", "orientation", "count")  # besides "source", for pre-training
PIXELS = 32
FACTORS = dict(shape=6, hue=8, texture=3, size=4, orientation=8, location=16, background=3)


def disc(u: Tensor, v: Tensor, cu: float, cv: float, radius: float) -> Tensor:
    """Signed distance to a disc: negative inside, positive outside."""
    return ((u - cu) ** 2 + (v - cv) ** 2).sqrt() - radius


def box(u: Tensor, v: Tensor, cu: float, cv: float, half_width: float, half_height: float):
    """Signed distance (the largest over the sides) to a box."""
    return torch.maximum((u - cu).abs() - half_width, (v - cv).abs() - half_height)


def wedge(u: Tensor, v: Tensor, tip: float, base: float, half_width: float) -> Tensor:
    """An upright or inverted triangle with its tip at (0, tip) and its base at height `base`."""
    slope = half_width / abs(tip - base)
    way = 1 if tip > base else -1
    side = (u.abs() - slope * way * (tip - v)) / math.sqrt(1 + slope**2)
    return torch.maximum(side, way * (base - v))


def union(*shapes: Tensor) -> Tensor:
    """Signed distance to what lies in any of the shapes."""
    return torch.stack(shapes).amin(0)


def cut(shape: Tensor, hole: Tensor) -> Tensor:
    """Signed distance to what lies in the shape and not in the hole."""
    return torch.maximum(shape, -hole)


# Twelve shapes about 2 wide, none with a rotational symmetry: each has one orientation alone.
SOURCE_SHAPES = [
    lambda u, v: wedge(u, v, 1.0, -0.8, 0.7),  # triangle
    lambda u, v: torch.maximum(disc(u, v, 0, -0.4, 1.0), -0.4 - v),  # half disc
    lambda u, v: union(box(u, v, -0.5, 0, 0.3, 0.9), box(u, v, 0.1, -0.6, 0.8, 0.3)),  # L
    lambda u, v: union(box(u, v, 0, 0.6, 0.8, 0.3), box(u, v, 0, -0.2, 0.28, 0.8)),  # T
    lambda u, v: union(disc(u, v, 0, -0.35, 0.6), wedge(u, v, 1.0, -0.2, 0.6)),  # drop
    lambda u, v: cut(
        disc(u, v, 0, 0, 0.95), union(disc(u, v, 0, 0, 0.45), box(u, v, 0, 0.7, 0.4, 0.7))
    ),  # horseshoe
]
TARGET_SHAPES = [
    lambda u, v: cut(disc(u, v, 0, 0, 0.95), disc(u, v, 0.1, 0.5, 0.7)),  # moon
    lambda u, v: cut(disc(u, v, 0, 0, 0.95), wedge(u, v, 0.0, 1.2, 1.0)),  # cut cake
    lambda u, v: union(wedge(u, v, 1.0, 0.0, 0.8), box(u, v, 0, -0.45, 0.25, 0.5)),  # arrow
    lambda u, v: union(wedge(u, v, 1.0, 0.1, 0.85), box(u, v, 0, -0.35, 0.6, 0.5)),  # house
    lambda u, v: union(
        disc(u, v, -0.4, 0.35, 0.48), disc(u, v, 0.4, 0.35, 0.48), wedge(u, v, -0.95, 0.15, 0.82)
    ),  # heart
    lambda u, v: union(
        cut(disc(u, v, 0, 0.4, 0.55), disc(u, v, 0, 0.4, 0.25)),
        box(u, v, 0, -0.5, 0.15, 0.5),
        box(u, v, 0.25, -0.8, 0.2, 0.15),
    ),  # key
]


def draw(task: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures (bytes, count×3×32×32) of a sprites task and their labels, count×factors.

    Positions, distances and colours are float64, so that what processors round differently is
    far below a byte's step; the tests pin digests of the pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw_some(task, min(500, count - i), generator) for i in range(0, count, 500)]
    images, labels = zip(*drawn)
    return torch.cat(images), torch.cat(labels)


def draw_some(task: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what is in n pictures, then paint: background, clutter, objects. Lengths in pixels."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        draws = torch.rand(*size, dtype=torch.float64, generator=generator)
        return low + (high - low) * draws

    def choice(options: int, *size: int) -> Tensor:
        return torch.randint(options, size, generator=generator)

    slots = 5 if task == "count" else 1  # places for objects in a picture
    factor = {name: choice(options, n, slots) for name, options in FACTORS.items()}
    number = choice(5, n) if task == "count" else torch.zeros(n, dtype=torch.long)
    if task == "count":  # objects of about 3.5 pixels in different cells of a 3×3 grid: no overlap
        cell = uniform(0, 1, n, 9).argsort(1)[:, :5]
        corner, pitch, spread, radius = PIXELS / 6, PIXELS / 3, 1.0, uniform(3.0, 4.2, n, slots)
    else:  # the label is a cell of a 4×4 grid, the object anywhere in it
        cell = factor["location"]
        corner, pitch, spread = 7.0, 6.0, 3.0
        radius = 4.0 + (factor["size"] + uniform(0.1, 0.9, n, slots)) * 1.25
    side = 3 if task == "count" else 4
    x = corner + pitch * (cell % side) + uniform(-spread, spread, n, slots)
    y = corner + pitch * (cell // side) + uniform(-spread, spread, n, slots)
    angle = (factor["orientation"] + uniform(-0.3, 0.3, n, slots)) * (2 * math.pi / 8)
    hue = (factor["hue"] + uniform(-0.25, 0.25, n, slots)) / 8
    colour = to_rgb(hue, uniform(0.7, 1.0, n, slots), uniform(0.75, 1.0, n, slots))

    rows = torch.arange(PIXELS, dtype=torch.float64) + 0.5
    py, px = torch.meshgrid(rows, rows, indexing="ij")  # 32 32
    canvas = background(factor["background"][:, 0], uniform, px, py)  # n 3 32 32
    if task != "source":
        for _ in range(6):  # clutter: dots of any colour, at most one pixel and a half in radius
            at = [uniform(0, PIXELS, n, 1, 1) for _ in range(2)]
            cover = (0.5 - disc(px, py, *at, uniform(0.7, 1.4, n, 1, 1))).clamp(0, 1)
            dot = to_rgb(uniform(0, 1, n), uniform(0.3, 1.0, n), uniform(0.4, 1.0, n))
            canvas = mix(canvas, cover, dot[:, :, None, None])
    for k in range(slots):
        dx, dy = px - x[:, k, None, None], y[:, k, None, None] - py  # y runs upward for shapes
        cos, sin = angle[:, k, None, None].cos(), angle[:, k, None, None].sin()
        scale = radius[:, k, None, None]
        u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale
        distance = torch.empty_like(u)
        for i, shape in enumerate(SOURCE_SHAPES if task == "source" else TARGET_SHAPES):
            mine = factor["shape"][:, k] == i
            distance[mine] = shape(u[mine], v[mine])
        cover = (0.5 - distance * scale).clamp(0, 1) * (k <= number)[:, None, None]
        stripes, across = (u * 7).sin() > 0, (v * 7).sin() > 0
        texture = factor["texture"][:, k, None, None]
        dark = ((texture == 1) & stripes) | ((texture == 2) & (stripes ^ across))
        paint = colour[:, k, :, None, None] * torch.where(dark, 0.4, 1.0).unsqueeze(1)
        canvas = mix(canvas, cover, paint)
    images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    if task == "source":
        return images, torch.cat(list(factor.values()), dim=1)
    return images, number[:, None] if task == "count" else factor[task]


def mix(below: Tensor, cover: Tensor, above: Tensor) -> Tensor:
    """Lay `above` over `below` with coverage n×32×32 between 0 and 1."""
    return below + cover.unsqueeze(1) * (above - below)


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue, saturation and value in 0…1, any shape → RGB along a new last axis."""
    wheel = (hue.unsqueeze(-1) * 6 + torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64)) % 6
    pure = ((wheel - 3).abs() - 1).clamp(0, 1)
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * (1 - pure))


def background(kind: Tensor, uniform, px: Tensor, py: Tensor) -> Tensor:
    """n×3×32×32: plain (0), a gradient in any direction (1) or noise on every pixel (2)."""
    n = len(kind)
    base = to_rgb(uniform(0, 1, n), uniform(0, 0.5, n), uniform(0.1, 0.5, n))[:, :, None, None]
    way = uniform(0, 2 * math.pi, n, 1, 1)
    ramp = ((px / PIXELS - 0.5) * way.cos() + (py / PIXELS - 0.5) * way.sin()).unsqueeze(1) * 0.5
    noise = uniform(-0.2, 0.2, n, 3, PIXELS, PIXELS)
    kind = kind[:, None, None, None]
    return base + ramp * (kind == 1) + noise * (kind == 2)
