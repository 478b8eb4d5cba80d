"""Folders of pictures as people have them: train/<class>/ and test/<class>/, read by Pillow.

Whatever is left out is said, and a file that cannot be read is named in one sentence.
[us] our choice.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from lab.checkpoints import in_one_line


class Files(Dataset):
    """Picture files and their class numbers: (RGB image, class number) pairs, read when asked for.

    The headers are read at once, so that what is no picture is named before a training starts;
    `sizes` holds every (width, height) they tell. Raises OSError, then or later.
    """

    def __init__(self, pairs: list[tuple[Path, int]]):
        self.pairs, self.sizes = pairs, set()
        for path, _ in tqdm(pairs, desc="reading headers", leave=False):
            with naming(path), Image.open(path) as image:
                self.sizes.add(image.size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.pairs[i]
        with naming(path), Image.open(path) as image:
            return to_rgb(image), label


class Unreadable(OSError):
    """A picture that cannot be read, in a sentence that names it."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong with a picture becomes one Unreadable."""
    try:
        yield
    except Unreadable:  # named already
        raise
    except Exception as error:  # Pillow's plugins raise nearly all there is: struct.error, KeyError
        reason = in_one_line(error) or type(error).__name__
        raise Unreadable(f"{path} is not a picture that can be read: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes → RGB, upright as its EXIF tag says.

    Grey beyond bytes is scaled as `grey_bytes` says; what is transparent shows white [us].
    Raises ValueError for values that have no scale.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow's own conversion cuts values off at 255
        image = Image.fromarray(grey_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values → bytes: whole numbers 0 … 65535 by 1/257; floats 0 … 1 by 255, 0 … 255 as is.

    Raises ValueError for values beyond, or not finite.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        known, most, factor = "0 … 1 or 0 … 255 in floats", *((1, 255) if high <= 1 else (255, 1))
    else:
        known, most, factor = "0 … 65535 in whole numbers", 65535, 1 / 257
    if not (low >= 0 and high <= most):  # nan is neither
        raise ValueError(f"its grey is {low:g} … {high:g}; what can be read is {known}")
    return (values * factor).round().astype(np.uint8)


def read_splits(root: Path) -> tuple[Files, Files, list[str]]:
    """The pictures of train/ and test/ below root, and the classes: train/'s, sorted.

    A label is the class's place among them. A class without test pictures, one without any, and
    files that are no pictures of a class are printed.
    Raises ValueError for a missing folder, or a class that only test/ has pictures of; OSError for
    a file that is not what its ending says.
    """
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise ValueError(f"{root} has no folder {split}/: expected {split}/<class>/ pictures")
    (train, left_out), (test, more) = listed(root / "train"), listed(root / "test")
    left_out += more
    classes = [name for name in train if train[name]]
    unseen = [name for name in test if test[name] and name not in classes]
    if unseen:
        raise ValueError(f"{root} has pictures in test/ but none in train/ of {some(unseen)}")
    for split, found in (("train", train), ("test", test)):
        if not any(found.values()):
            raise ValueError(f"{root / split} has no pictures: expected {split}/<class>/ pictures")
    if left_out:
        first = left_out[0].relative_to(root)
        print(f"{root}: left out, being no picture of a class: {len(left_out)}, the first {first}")
    if untested := [name for name in classes if not test.get(name)]:
        print(f"{root}: no test pictures of {some(untested)}")
    if empty := sorted({*train, *test} - {*classes}):
        print(f"{root}: no class, without any picture: {some(empty)}")

    def files(found: dict[str, list[Path]]) -> Files:
        numbered = enumerate(classes)
        return Files([(path, label) for label, name in numbered for path in found.get(name, [])])

    return files(train), files(test), classes


def listed(split: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of every class folder, in torchvision ImageFolder's order, and other files.

    What begins with a dot is neither: editors and systems leave such files and folders behind.
    """

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(split).parts)

    entries = [split / name for name in sorted(os.listdir(split))]
    classes = {entry.name: [] for entry in entries if entry.is_dir() and not hidden(entry)}
    others = [entry for entry in entries if not entry.is_dir() and not hidden(entry)]
    for name, pictures in classes.items():
        for folder, _, files in sorted(os.walk(split / name, followlinks=True)):
            for path in (Path(folder, file) for file in sorted(files)):
                if not hidden(path):
                    (pictures if path.suffix.lower() in endings() else others).append(path)
    return classes, others


@functools.cache
def endings() -> set[str]:
    """Of the files that Pillow can open: .jpg, .png, …"""
    known = Image.registered_extensions().items()
    return {ending for ending, kind in known if kind in Image.OPEN}


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
