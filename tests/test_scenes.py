"""lab/scenes.py: what is asked about a scene can be seen there, and nowhere else."""

import hashlib
import re
from collections import Counter

import pytest
import torch

from lab import scenes
from lab.scenes import COLOURS, NUMBERS, PLACES, RELATIONS, SHAPES, UNANSWERABLE, Thing

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = "|".join((*SHAPES, "sign"))
HUES, WHERE, HOW = "|".join(COLOURS), "|".join(PLACES), "|".join(RELATIONS)


def only(found: list[str]) -> str:
    """The one value that all agree on; nothing and several are unanswerable."""
    return found[0] if len(found) == 1 else UNANSWERABLE


def answer(scene: list[Thing], text: str) -> str:
    """What a scene answers, from the question's words alone: written apart from lab/scenes.py."""

    def read(pattern: str) -> tuple[str, ...] | None:
        found = re.match(pattern.format(s=f"({NAMES})", c=f"({HUES})", r=f"({HOW})"), text)
        return found and found.groups()

    def beside(relation: str, anchors: list[Thing]) -> list[Thing]:
        if len(anchors) != 1:
            return []
        return [t for t in scene if (t.place, anchors[0].place) in RELATIONS[relation]]

    if text == "How many objects are there?":
        return NUMBERS[len(scene)]
    if found := read("How many {c} objects are there"):
        return NUMBERS[sum(t.colour == found[0] for t in scene)]
    if found := read("What colour is the (small|large) {s}\\?"):
        return only([t.colour for t in scene if (t.size, t.shape) == found])
    if found := read("What colour is the {s}\\?"):
        return only([t.colour for t in scene if t.shape == found[0]])
    if found := read("What shape is the {c} object\\?"):
        return only([t.shape for t in scene if t.colour == found[0]])
    if found := read("What colour is the object {r} the {s}\\?"):
        return only([t.colour for t in beside(found[0], [t for t in scene if t.shape == found[1]])])
    if found := read("What shape is the object {r} the {c} object\\?"):
        return only([t.shape for t in beside(found[0], [t for t in scene if t.colour == found[1]])])
    if found := read("Which is larger, the {s} or the {s}\\?"):
        return only([t.shape for t in scene if t.shape in found and t.size == "large"])
    if found := read("Do the {s} and the {s} have the same colour"):
        pair = [t.colour for t in scene if t.shape in found]
        return ("no", "yes")[pair[0] == pair[1]] if len(pair) == 2 else UNANSWERABLE
    if found := read("Is there a {c} {s}\\?"):
        return ("no", "yes")[found in [(t.colour, t.shape) for t in scene]]
    if found := read("What is {c} is (?:\\w+)\\."):
        return only([t.shape for t in scene if t.colour == found[0]])
    if found := read("Where is the {s}\\?"):
        return only([PLACES[t.place] for t in scene if t.shape == found[0]])
    signs = [t for t in scene if t.letter]
    if found := read(f"What does the sign at the ({WHERE}) say"):
        return only([t.letter for t in signs if PLACES[t.place] == found[0]])
    if found := read("What does the {c} sign say"):
        return only([t.letter for t in signs if t.colour == found[0]])
    assert text.startswith("What does the sign say?"), text
    return only([t.letter for t in signs])


@pytest.mark.parametrize("family", scenes.FAMILIES)
def test_the_scene_gives_the_answer(family):
    for asked in scenes.questions(family, "train", 400):
        most = Counter(asked.answers).most_common(1)[0][0]
        assert answer(asked.scene, asked.text) == most, asked
        assert len(asked.answers) == (10 if family in ("VQAv2", "VizWiz", "TextVQA") else 1)
        assert {*asked.answers[:3]} == {most} and most in asked.options
        places = [t.place for t in asked.scene]
        assert len({*places}) == len(places) <= 4
        assert all(bool(t.letter) == (t.shape == "sign") for t in asked.scene)
    if family in ("SQA", "MMBench"):
        assert asked.text.endswith("? " + " / ".join(asked.options))


def test_an_adversarial_no_has_its_colour_and_its_shape_apart():
    for i, asked in enumerate(scenes.questions("POPE", "train", 600)):
        colour, shape = asked.text[11:-1].split()
        if i % 3 == 2 and asked.answers == ("no",):
            assert colour in [t.colour for t in asked.scene]
            assert shape in [t.shape for t in asked.scene]
        if i % 3 == 1:
            assert colour in scenes.POPULAR[0] and shape in scenes.POPULAR[1]


def test_mmbench_is_scored_in_every_rotation_and_trained_in_one():
    asked = scenes.questions("MMBench", "test", 5)
    assert len(asked) == 20 and len(scenes.questions("MMBench", "train", 5)) == 5
    for i in range(0, 20, 4):
        first = asked[i]
        for turn, one in enumerate(asked[i : i + 4]):
            assert one.options == first.options[turn:] + first.options[:turn]
            assert one.scene is first.scene and one.answers == first.answers


@pytest.mark.parametrize("long", [False, True])
def test_texts_are_true_and_ask_nothing(long):
    for scene, text in zip(*scenes.captions(300, 7, long)):
        assert "?" not in text and text.endswith(".")
        for there, colour, shape in re.findall(rf"A ({HUES}) ({NAMES}) is (there|not there)", text):
            found = (there, colour) in [(t.colour, t.shape) for t in scene]
            assert found == (shape == "there")
        for size, shape in re.findall(rf"The ({NAMES}) is (small|large)", text):
            assert [t.size for t in scene if t.shape == size] == [shape]
        for place, colour in re.findall(rf"The object at the ({WHERE}) is ({HUES})\.", text):
            assert [t.colour for t in scene if PLACES[t.place] == place] == [colour]
        for relation, shape, colour in re.findall(
            rf"The colour of the object ({HOW}) the ({NAMES}) is ({HUES})", text
        ):
            assert answer(scene, f"What colour is the object {relation} the {shape}?") == colour
        if not long:
            assert text.count(" at the ") == len(scene)
            assert all(f"{t.colour} {t.shape}" in text for t in scene)


def picture(*things: Thing, seed: int = 0) -> torch.Tensor:
    return scenes.draw([[*things]], seed)[0].float()


def test_an_object_is_drawn_in_its_quarter_in_its_colour():
    empty, red = picture(), picture(Thing("circle", "red", "large", 3))
    changed = (empty != red).any(0)
    assert not changed[:16].any() and not changed[16:, :16].any()
    assert 80 < changed.sum() < 130  # π 5.7² = 102
    assert red[0, 24, 24] > 180 and red[1:, 24, 24].max() < 70
    small = (empty != picture(Thing("circle", "red", "small", 3))).any(0)
    assert small.sum() < changed.sum() / 2


def test_every_letter_is_told_from_every_other():
    drawn = [picture(Thing("sign", "green", "large", 0, letter)) for letter in scenes.LETTERS]
    black = [(image.amax(0) == 0) for image in drawn]
    for i, one in enumerate(black):
        assert one.sum() > 8
        for other in black[:i]:
            assert (one ^ other).sum() >= 4


def test_every_shape_is_told_from_every_other():
    drawn = [picture(Thing(shape, "red", "small", 0)) for shape in SHAPES]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert ((one - other).abs().amax(0) > 60).sum() >= 4


def test_the_same_seed_gives_the_same_scenes_and_pictures():
    """Digests of what the shipped weights have seen: if they change, it is another data set."""
    asked = [a for family in scenes.FAMILIES for a in scenes.questions(family, "test", 40)]
    described = [scenes.captions(40, 0, long) for long in (False, True)]
    pictures = scenes.draw([a.scene for a in asked], 0)
    texts = repr([a[1:] for a in asked]) + repr(described)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "ae660ac8118511e1"
    assert hashlib.sha256(pictures.numpy().tobytes()).hexdigest()[:16] == "47fc5dbf63486814"
