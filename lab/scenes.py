"""scenes: small pictures of a few objects, texts that describe them, questions about them.

A scene has one to four objects, at most one in each quarter of the picture: a shape with a colour
and a size, or a sign that says a letter. `captions` describes scenes, for pre-training; `questions`
asks about others, in seven families that mirror the formats and scores of the sets that LLaVA is
adapted to:

VQAv2    counting and attributes; ten annotators answered, not always alike
GQA      relations, comparisons, two steps
VizWiz   attributes and signs, often of what is not there: "unanswerable"; ten annotators
SQA      a fact is told, and the picture decides which of three options it makes right
TextVQA  what a sign says; ten annotators
POPE     is there a …? What is not there is drawn in three ways: at random, from what is popular in
         all scenes, or adversarial: its colour and its shape are there, on different objects
MMBench  four options, asked once with each rotation of their list

The answer is drawn first and the scene then made for it, so that neither a question's words nor its
list of options tell anything: whoever does not look can only guess. Drawn by Python's `random` and,
as in sprites, in float64; a test's digests tell if it ever comes out different. All of it is our
choice [us].
"""

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lab.sprites import (
    PIXELS,
    TARGET_SHAPES,
    background,
    box,
    cut,
    disc,
    mix,
    to_rgb,
    union,
    wedge,
)

FAMILIES = ("VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MMBench")
COUNTS = {"train": 1000, "val": 200, "test": 500}  # questions of a family
SAMPLINGS = ("random", "popular", "adversarial")  # of POPE, in turn

COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")  # around the wheel
SHAPES = ("circle", "ring", "heart", "triangle", "square", "cross")
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # the quarters, 0 … 3
SIZES = ("small", "large")
# red and blue, circles and squares are drawn twice as often as others
POPULAR = ("red", "blue"), ("circle", "square")
LETTERS = {  # 5×7 pixels, a hexadecimal digit pair per row
    "A": "0e11111f111111",
    "C": "0e11101010110e",
    "H": "1111111f111111",
    "L": "1010101010101f",
    "P": "1e11111e101010",
    "T": "1f040404040404",
    "X": "11110a040a1111",
    "Z": "1f01020408101f",
}
UNANSWERABLE = "unanswerable"
# what each family may be answered with, where a question lists no options
ANSWERS = {
    "VQAv2": (*NUMBERS, *COLOURS, *SHAPES, "sign"),
    "GQA": (*COLOURS, *SHAPES, "sign", "yes", "no"),
    "VizWiz": (*COLOURS, *SHAPES, "sign", *LETTERS, UNANSWERABLE),
    "TextVQA": (*LETTERS,),
    "POPE": ("yes", "no"),
}
# SQA's facts: what is red is hot
VIRTUES = ("hot", "cold", "sweet", "sour", "heavy", "light", "old", "new")
# (how it is said, the pairs of quarters of which the first is so to the second)
RELATIONS = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}


class Thing(NamedTuple):
    """An object of a scene; `place` is its quarter, 0 … 3, `letter` what a sign says, else ''."""

    shape: str
    colour: str
    size: str
    place: int
    letter: str = ""


class Asked(NamedTuple):
    """A question about a scene: its options, and the answers of one annotator or of ten."""

    scene: list[Thing]
    text: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


# ------------------------------------------------------------------------------------ scenes

Fits = Callable[[Thing], bool]


def anything(_: Thing) -> bool:
    return True


def lacking(**properties: tuple[str, ...]) -> Fits:
    """Fits an object that has none of these properties."""
    return lambda t: all(getattr(t, name) not in words for name, words in properties.items())


def thing(rng: random.Random, place: int, fits: Fits = anything, **fixed: str) -> Thing:
    """A random object in a quarter, some of its properties fixed, that fits."""
    colours, shapes = (values + POPULAR[i] for i, values in enumerate((COLOURS, SHAPES)))
    while True:
        drawn = dict(shape=rng.choice((*shapes, "sign")), colour=rng.choice(colours)) | fixed
        sign = drawn["shape"] == "sign"
        size = "large" if sign else fixed.get("size", rng.choice(SIZES))
        letter = fixed.get("letter", rng.choice([*LETTERS])) if sign else ""
        found = Thing(drawn["shape"], drawn["colour"], size, place, letter)
        if fits(found):
            return found


def around(
    rng: random.Random, things: list[Thing], fits: Fits = anything, most: int = 4
) -> list[Thing]:
    """A scene of up to `most` objects: those that are given, and others that fit."""
    free = rng.sample(sorted({0, 1, 2, 3} - {t.place for t in things}), 4 - len(things))
    more = rng.randint(max(len(things), 1), max(len(things), most)) - len(things)
    return rng.sample([*things, *(thing(rng, p, fits) for p in free[:more])], len(things) + more)


def alone(scene: Iterable[Thing], **properties: str) -> bool:
    """Whether exactly one object has these properties."""
    return sum(all(getattr(t, k) == v for k, v in properties.items()) for t in scene) == 1


# --------------------------------------------------------------------------------- questions


def questions(family: str, split: str, count: int | None = None) -> list[Asked]:
    """`count` questions of a family and a split of COUNTS, each about a scene of its own.

    MMBench's that are not for training come four in a row, the options rotated.
    """
    rng = random.Random(1 + FAMILIES.index(family) * len(COUNTS) + [*COUNTS].index(split))
    found = []
    for turn in range(count or COUNTS[split]):
        asked = ASK[family](rng, turn)
        rotated = family == "MMBench" and split != "train"
        found += [listed(asked, r) for r in range(4 if rotated else 1)]
    return found


def listed(asked: Asked, rotation: int) -> Asked:
    """The question with its options, rotated, at its end, where it is no open question."""
    if asked.options in ANSWERS.values():
        return asked
    options = (*asked.options[rotation:], *asked.options[:rotation])
    return asked._replace(options=options, text=f"{asked.text} {' / '.join(options)}")


def annotators(rng: random.Random, right: str, also: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Ten answers: one in ten is `also`, or else what comes before or after in its list."""
    for words in (COLOURS, SHAPES, NUMBERS, tuple(LETTERS)):
        if right in words and not also:
            i = words.index(right)
            also = words[i - 1], words[(i + 1) % len(words)]
    given = [rng.choice(also) if also and rng.random() < 0.1 else right for _ in range(7)]
    return (right,) * 3 + (*given,)


def attribute(rng: random.Random, missing: bool = False) -> tuple[list[Thing], str, str]:
    """A scene, a question about one of its objects, and the answer; or about what is missing."""
    kind = rng.randrange(3)
    colour, shape = rng.choice(COLOURS), rng.choice((*SHAPES, "sign"))
    if kind == 0:
        text, right, fits = f"What colour is the {shape}?", colour, lacking(shape=(shape,))
    elif kind == 1:
        text, right, fits = f"What shape is the {colour} object?", shape, lacking(colour=(colour,))
    else:
        shape, right = "sign", rng.choice([*LETTERS])
        text, fits = "What does the sign say?", lacking(shape=("sign",))
    own = dict(shape=shape, colour=colour) | ({"letter": right} if kind == 2 else {})
    given = [] if missing else [thing(rng, rng.randrange(4), **own)]
    return around(rng, given, fits), text, right


def ask_vqa(rng: random.Random, turn: int) -> Asked:
    kind, colour = rng.randrange(4), rng.choice(COLOURS)
    if kind == 0:
        count = rng.randint(1, 4)
        scene = [thing(rng, p) for p in rng.sample(range(4), count)]
        text, right = "How many objects are there?", NUMBERS[count]
    elif kind == 1:
        count = rng.randrange(4)
        own = [thing(rng, p, colour=colour) for p in rng.sample(range(4), count)]
        scene = around(rng, own, lacking(colour=(colour,)))
        text, right = f"How many {colour} objects are there?", NUMBERS[count]
    else:
        while True:
            scene, text, right = attribute(rng)
            if right not in LETTERS:
                break
    return Asked(scene, text, ANSWERS["VQAv2"], annotators(rng, right))


def ask_gqa(rng: random.Random, turn: int) -> Asked:
    kind = rng.randrange(5)
    colour, other = rng.sample(COLOURS, 2)
    first, second = rng.sample(SHAPES, 2)
    relation = rng.choice([*RELATIONS])
    a, b = rng.choice(RELATIONS[relation])
    if kind == 0:
        fits = lacking(shape=(second,))
        own = [thing(rng, a, fits, colour=colour), thing(rng, b, shape=second)]
        text, right = f"What colour is the object {relation} the {second}?", colour
    elif kind == 1:
        fits = lacking(colour=(other,))
        own = [thing(rng, a, fits, shape=first), thing(rng, b, colour=other)]
        text, right = f"What shape is the object {relation} the {other} object?", first
    elif kind == 2:
        fits = lacking(shape=(first, second))
        own = [thing(rng, a, shape=first, size="large"), thing(rng, b, shape=second, size="small")]
        right, (one, two) = first, rng.sample((first, second), 2)
        text = f"Which is larger, the {one} or the {two}?"
    elif kind == 3:
        fits = lacking(shape=(first, second))
        right = rng.choice(("yes", "no"))
        same = colour if right == "yes" else other
        own = [thing(rng, a, shape=first, colour=colour), thing(rng, b, shape=second, colour=same)]
        text = f"Do the {first} and the {second} have the same colour?"
    else:
        fits = lacking(shape=(first,))
        size, not_size = rng.sample(SIZES, 2)
        own = [
            thing(rng, a, shape=first, size=size, colour=colour),
            thing(rng, b, shape=first, size=not_size, colour=other),
        ]
        text, right = f"What colour is the {size} {first}?", colour
    return Asked(around(rng, own, fits), text, ANSWERS["GQA"], (right,))


def ask_vizwiz(rng: random.Random, turn: int) -> Asked:
    missing = rng.random() < 0.25
    scene, text, right = attribute(rng, missing)
    right, also = (UNANSWERABLE, (right,)) if missing else (right, ())
    return Asked(scene, text, ANSWERS["VizWiz"], annotators(rng, right, also))


def ask_sqa(rng: random.Random, turn: int) -> Asked:
    shapes, virtue = rng.sample((*SHAPES, "sign"), 3), rng.choice(VIRTUES)
    colours = rng.sample(COLOURS, 3)
    own = [
        thing(rng, place, shape=shape, colour=colour)
        for place, shape, colour in zip(rng.sample(range(4), 3), shapes, colours)
    ]
    scene = around(rng, own, lacking(shape=(*shapes,), colour=(colours[0],)))
    options = rng.sample(shapes, 3)
    text = f"What is {colours[0]} is {virtue}. Which is {virtue}?"
    return Asked(scene, text, (*options,), (shapes[0],))


def ask_textvqa(rng: random.Random, turn: int) -> Asked:
    (a, b, *_), (right, wrong) = rng.sample(range(4), 4), rng.sample([*LETTERS], 2)
    colour, other = rng.sample(COLOURS, 2)
    own = [
        thing(rng, a, shape="sign", letter=right, colour=colour),
        thing(rng, b, shape="sign", letter=wrong, colour=other),
    ]
    kind = rng.randrange(3)
    which = ("sign", f"{colour} sign", f"sign at the {PLACES[a]}")[kind]
    scene = around(rng, own if kind else own[:1], lacking(shape=("sign",)))
    return Asked(scene, f"What does the {which} say?", ANSWERS["TextVQA"], annotators(rng, right))


def ask_pope(rng: random.Random, turn: int) -> Asked:
    sampling, right = SAMPLINGS[turn % 3], rng.choice(("yes", "no"))
    colours, shapes = POPULAR if sampling == "popular" else (COLOURS, SHAPES)
    colour, shape = rng.choice(colours), rng.choice(shapes)
    places, own = rng.sample(range(4), 4), []

    def not_it(t: Thing) -> bool:
        return (t.colour, t.shape) != (colour, shape)

    if sampling == "adversarial":  # its colour alone, with "no" its shape alone as well
        own.append(thing(rng, places[1], not_it, colour=colour))
        if right == "no":
            own.append(thing(rng, places[2], not_it, shape=shape))
    if right == "yes":
        own.append(thing(rng, places[0], colour=colour, shape=shape))
    text = f"Is there a {colour} {shape}?"
    return Asked(around(rng, own, not_it), text, ANSWERS["POPE"], (right,))


def ask_mmbench(rng: random.Random, turn: int) -> Asked:
    if rng.randrange(4) == 0:
        shape, place = rng.choice((*SHAPES, "sign")), rng.randrange(4)
        own = [thing(rng, place, shape=shape)]
        scene = around(rng, own, lacking(shape=(shape,)))
        text, right, values = f"Where is the {shape}?", PLACES[place], PLACES
    else:
        scene, text, right = attribute(rng)
        lists = (COLOURS, (*SHAPES, "sign"), tuple(LETTERS))
        values = next(words for words in lists if right in words)
    options = rng.sample([right, *rng.sample([v for v in values if v != right], 3)], 4)
    return Asked(scene, text, (*options,), (right,))


ASK: dict[str, Callable[[random.Random, int], Asked]] = dict(
    zip(
        FAMILIES,
        (ask_vqa, ask_gqa, ask_vizwiz, ask_sqa, ask_textvqa, ask_pope, ask_mmbench),
    )
)

# -------------------------------------------------------------------------- texts on pictures


def captions(count: int, seed: int, long: bool) -> tuple[list[list[Thing]], list[str]]:
    """`count` scenes, and a text on each: a caption, or with `long` a description."""
    rng = random.Random(1000 + seed)
    scenes = [around(rng, []) for _ in range(count)]
    return scenes, [(describe if long else caption)(scene, rng) for scene in scenes]


def caption(scene: list[Thing], rng: random.Random) -> str:
    """All objects in one row, each with its properties and quarter."""
    named = [f"a {named_whole(t)} at the {PLACES[t.place]}" for t in rng.sample(scene, len(scene))]
    return "; ".join(named) + "."


def named_whole(t: Thing) -> str:
    return f"{t.colour} sign that says {t.letter}" if t.letter else f"{t.size} {t.colour} {t.shape}"


def describe(scene: list[Thing], rng: random.Random) -> str:
    """Five true sentences, each about one thing that can be seen."""
    return " ".join(rng.choice(SENTENCES)(scene, rng) for _ in range(5))


def say_count(scene: list[Thing], rng: random.Random) -> str:
    """How many there are: objects, objects of a colour, or of a shape."""
    which = rng.choice(("", rng.choice(COLOURS), rng.choice(scene).colour))
    count = sum(t.colour == which or not which for t in scene)
    objects = f"{which} object".strip() + ("" if count == 1 else "s")
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {objects}."


def say_attribute(scene: list[Thing], rng: random.Random) -> str:
    """One property of an object that is named by another one that it alone has."""
    t = rng.choice(scene)
    about = [f"The object at the {PLACES[t.place]} is {rng.choice((t.colour, 'a ' + t.shape))}."]
    if alone(scene, shape=t.shape):
        about.append(f"The colour of the {t.shape} is {t.colour}.")
        about.append(f"The {t.shape} is at the {PLACES[t.place]}.")
        about.append(
            f"The {t.shape} says {t.letter}." if t.letter else f"The {t.shape} is {t.size}."
        )
    elif alone(scene, shape=t.shape, size=t.size):
        about.append(f"The colour of the {t.size} {t.shape} is {t.colour}.")
    if alone(scene, colour=t.colour):
        about.append(f"The shape of the {t.colour} object is {t.shape}.")
    if t.letter:
        if alone(scene, shape="sign", colour=t.colour):
            about.append(f"The {t.colour} sign says {t.letter}.")
        about.append(f"The sign at the {PLACES[t.place]} says {t.letter}.")
    return rng.choice(about)


def say_presence(scene: list[Thing], rng: random.Random) -> str:
    """That a coloured shape is there, or is not."""
    t, other = rng.choice(scene), rng.choice(scene)
    colour, shape = rng.choice(((t.colour, other.shape), (rng.choice(COLOURS), rng.choice(SHAPES))))
    there = any((t.colour, t.shape) == (colour, shape) for t in scene)
    return f"A {colour} {shape} is {'there' if there else 'not there'}."


def say_relation(scene: list[Thing], rng: random.Random) -> str:
    """Two objects compared, or one found from another; of a single one, a property."""
    if len(scene) == 1:
        return say_attribute(scene, rng)
    a, b = rng.sample(scene, 2)
    about = []
    for relation, pairs in RELATIONS.items():
        if (a.place, b.place) in pairs:
            if alone(scene, shape=b.shape):
                about.append(f"The colour of the object {relation} the {b.shape} is {a.colour}.")
            if alone(scene, colour=b.colour):
                which = f"{relation} the {b.colour} object"
                about.append(f"The shape of the object {which} is {a.shape}.")
    if a.shape != b.shape and alone(scene, shape=a.shape) and alone(scene, shape=b.shape):
        same = "the same colour" if a.colour == b.colour else "different colours"
        about.append(f"The {a.shape} and the {b.shape} have {same}.")
        if a.size != b.size:
            large, small = (a, b) if a.size == "large" else (b, a)
            about.append(f"Of the {a.shape} and the {b.shape}, the {large.shape} is larger.")
    return rng.choice(about) if about else say_attribute(scene, rng)


SENTENCES = (say_attribute, say_attribute, say_count, say_presence, say_relation)

# ----------------------------------------------------------------------------------- pictures

# signed distances to shapes about 2 wide, as in sprites
OUTLINES = {
    "circle": lambda u, v: disc(u, v, 0, 0, 0.95),
    "ring": lambda u, v: cut(disc(u, v, 0, 0, 0.98), disc(u, v, 0, 0, 0.5)),
    "heart": TARGET_SHAPES[4],
    "triangle": lambda u, v: wedge(u, v, 1.0, -0.8, 0.95),
    "square": lambda u, v: box(u, v, 0, 0, 0.82, 0.82),
    "cross": lambda u, v: union(box(u, v, 0, 0, 0.28, 0.95), box(u, v, 0, 0, 0.95, 0.28)),
    "sign": lambda u, v: box(u, v, 0, 0, 0.8, 0.95),
}
RADIUS = {"small": 3.8, "large": 6.0}  # pixels; a sign is large
GLYPHS = torch.zeros(1 + len(LETTERS), 9, 7, dtype=torch.bool)  # framed; the first is empty
for glyph, code in zip(GLYPHS[1:], LETTERS.values()):
    bits = torch.tensor([*bytes.fromhex(code)])[:, None] >> torch.arange(4, -1, -1) & 1
    glyph[1:8, 1:6] = bits.bool()


def draw(scenes: list[list[Thing]], seed: int) -> Tensor:
    """Pictures of scenes, bytes N×3×32×32: on plain or noisy ground, a pixel here or there."""
    generator = torch.Generator().manual_seed(seed)
    parts = [draw_some(scenes[i : i + 500], generator) for i in range(0, len(scenes), 500)]
    return torch.cat(parts)


def draw_some(scenes: list[list[Thing]], generator: torch.Generator) -> Tensor:
    n = len(scenes)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        draws = torch.rand(*size, dtype=torch.float64, generator=generator)
        return low + (high - low) * draws

    pixels = torch.arange(PIXELS, dtype=torch.float64) + 0.5
    py, px = torch.meshgrid(pixels, pixels, indexing="ij")
    noisy = torch.randint(2, (n,), generator=generator)
    canvas = background(2 * noisy, uniform, px, py)
    side = PIXELS // 2
    py, px = py[:side, :side], px[:side, :side]  # of a quarter
    shapes, letters = [*OUTLINES], ["", *LETTERS]
    for place in range(4):
        quarter = canvas.unflatten(3, (2, side)).unflatten(2, (2, side))[
            :, :, place // 2, :, place % 2
        ]
        found = [(i, t) for i, scene in enumerate(scenes) for t in scene if t.place == place]
        rows = torch.tensor([i for i, _ in found], dtype=torch.long)
        shape = torch.tensor([shapes.index(t.shape) for _, t in found])
        letter = torch.tensor([letters.index(t.letter) for _, t in found], dtype=torch.long)
        hue = torch.tensor([COLOURS.index(t.colour) for _, t in found]) / 6.0
        radius = torch.tensor([RADIUS[t.size] for _, t in found]).double()[:, None, None]
        k = len(found)
        x, y = side / 2 + torch.randint(-1, 2, (2, k, 1, 1), generator=generator).double()
        u, v = (px - x) / radius, (y - py) / radius  # y runs upward for shapes
        distance = torch.empty_like(u)
        for i, outline in enumerate(OUTLINES.values()):
            distance[shape == i] = outline(u[shape == i], v[shape == i])
        hue = hue.double() + uniform(-0.02, 0.02, k)
        paint = to_rgb(hue, uniform(0.75, 1, k), uniform(0.8, 1, k))[:, :, None, None]
        part = mix(quarter[rows], (0.5 - distance * radius).clamp(0, 1), paint)
        # which of the glyph's 7×5 pixels lies on a pixel, in a frame of empty ones
        row, column = (py - y + 4.5).floor().clamp(0, 8), (px - x + 3.5).floor().clamp(0, 6)
        black = GLYPHS[letter[:, None, None], row.long(), column.long()]
        quarter[rows] = part * ~black[:, None]
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
