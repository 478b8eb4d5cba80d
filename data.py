"""The data sets: `sprites`, drawn here, torchvision's, and folders of pictures.

Every set comes back as `Data`: three splits of (picture, label) pairs, a picture being 3×H×W
bytes and a label one whole number a factor (most sets have one factor, the class).
`to_input` turns a batch of bytes into what a model reads, on whatever device it is.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

TASKS = ("shape", "location", "orientation", "count")  # of sprites; "source" is for pre-training


class Data(NamedTuple):
    """A data set's splits; `factors` holds the number of classes of each factor, one head for each.

    `plain` is the training split without augmentation, for features that are computed once.
    """

    train: Dataset
    plain: Dataset
    val: Dataset
    test: Dataset
    factors: list[int]


def to_input(images: Tensor) -> Tensor:
    """Bytes B×3×H×W → numbers scaled by ImageNet's mean and deviation, as the weights expect."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def load(
    name: str,
    task: str = "shape",
    data_dir: str = "data",
    image_size: int = 224,
    shots: int | None = None,
    source_size: int = 100_000,
) -> Data:
    """The data set `name`: 'sprites', a name of TORCHVISION, or a folder with train/ and test/.

    shots: how many labelled pictures in all, a fifth of them for validation. Which pictures those
    are does not depend on a run's seed. Raises ValueError for a name, a folder's contents or a
    number that cannot be used, OSError for files that are missing, broken or cannot be downloaded.
    """
    if name == "sprites":
        data = sprites(task, source_size)
    elif name in TORCHVISION:
        data = from_torchvision(name, Path(data_dir), image_size)
    elif Path(name).is_dir():
        data = from_folder(Path(name), image_size)
    else:
        raise ValueError(
            f"data set '{name}' is neither a folder nor one of: sprites, {', '.join(TORCHVISION)}"
        )
    return data if shots is None else take(data, shots)


def take(data: Data, shots: int) -> Data:
    """Keep `shots` labelled pictures: 80 % for training, 20 % for validation (VTAB-1k's way)."""
    train, val = shots - shots // 5, shots // 5
    if shots < 5 or train > len(data.train) or val > len(data.val):
        raise ValueError(
            f"--shots {shots} asks for {train} training and {val} validation pictures; this set "
            f"has {len(data.train)} and {len(data.val)}; at least 5 in all are needed"
        )
    return data._replace(
        train=subset(data.train, 0, train),
        plain=subset(data.plain, 0, train),
        val=subset(data.val, 0, val),
    )


def subset(pictures: Dataset, start: int, stop: int) -> Subset:
    """Pictures start … stop − 1 of one shuffled order that is the same in every run."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    return Subset(pictures, order[start:stop].tolist())


# --------------------------------------------------------------------------------------- sprites

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


def sprites(task: str, source_size: int = 100_000) -> Data:
    """Our stand-in for VTAB-1k's structured tasks, drawn on the fly, the same on every machine.

    source: one of six shapes a picture, all FACTORS asked at once; for pre-training.
    shape (6 classes), location (16), orientation (8), count (1 to 5): six other shapes among
    small dots; 800 training, 200 validation and 2000 test pictures.
    """
    if task == "source":
        sizes, factors = (source_size, 2000, 2000), list(FACTORS.values())
    elif task in TASKS:
        sizes, factors = (800, 200, 2000), [5 if task == "count" else FACTORS[task]]
    else:
        raise ValueError(f"task '{task}' is unknown; choose one of source, {', '.join(TASKS)}")
    # a stream of its own for every task and split, whatever the run's seed
    seeds = [10 * ("source", *TASKS).index(task) + split for split in range(3)]
    train, val, test = (TensorDataset(*draw(task, n, seed)) for n, seed in zip(sizes, seeds))
    return Data(train, train, val, test, factors)


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


# ----------------------------------------------------------------- torchvision's sets and folders

# name: torchvision's class, the folder it keeps its files in below --data-dir, arguments of its
# training, validation (None: it has none) and test split (None: it has no split), classes
# fmt: off
TRAIN, VAL, TEST = {"split": "train"}, {"split": "val"}, {"split": "test"}
TORCHVISION = {
    "cifar10": ("CIFAR10", "", {"train": True}, None, {"train": False}, 10),
    "cifar100": ("CIFAR100", "", {"train": True}, None, {"train": False}, 100),
    "svhn": ("SVHN", "", TRAIN, None, TEST, 10),
    "flowers102": ("Flowers102", "flowers-102", TRAIN, VAL, TEST, 102),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet", {"split": "trainval"}, None, TEST, 37),
    "dtd": ("DTD", "dtd", TRAIN, VAL, TEST, 47),
    "eurosat": ("EuroSAT", "eurosat", {}, None, None, 10),
    "food101": ("Food101", "", TRAIN, None, TEST, 101),
    "stanford_cars": ("StanfordCars", "stanford_cars", TRAIN, None, TEST, 196),
    "caltech101": ("Caltech101", "caltech101", {}, None, None, 101),
    "sun397": ("SUN397", "", {}, None, None, 397),
    "pcam": ("PCAM", "pcam", TRAIN, VAL, TEST, 2),
    # CLEVR's own test pictures carry no counts; VTAB-1k scores on its validation split, and so we
    "clevr_count": ("CLEVRClassification", "clevr", TRAIN, None, VAL, 8),
}
# fmt: on


class Single(Dataset):
    """A set of (picture, class number) pairs as (bytes, one-factor label) pairs."""

    def __init__(self, pictures: Dataset, transform: v2.Transform, first_class: int = 0):
        self.pictures, self.transform, self.first_class = pictures, transform, first_class

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = self.pictures[i]
        return self.transform(image), torch.tensor([int(label) - self.first_class])


def transforms(image_size: int, flip: bool = True) -> tuple[v2.Transform, v2.Transform]:
    """(training, evaluation): a direct resize; training crops lightly, 70 % or more, and flips."""
    train = v2.Compose(
        [
            v2.RGB(),
            v2.RandomResizedCrop((image_size, image_size), (0.7, 1.0), antialias=True),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.PILToTensor(),
        ]
    )
    test = v2.Compose([v2.RGB(), v2.Resize((image_size, image_size)), v2.PILToTensor()])
    return train, test


def from_torchvision(name: str, root: Path, image_size: int) -> Data:
    """A set of torchvision's, downloaded to `root` where it is not there yet.

    A set without a validation split gives a fifth of its training pictures for it, and a set
    without any split (eurosat, caltech101, sun397) first a fifth of all to testing: our choice,
    the same in every run.
    """
    class_name, folder, train_split, val_split, test_split, classes = TORCHVISION[name]
    dataset = getattr(datasets, class_name)

    def open_split(arguments: dict) -> Dataset:
        try:
            # torchvision has no working download for stanford_cars, and refuses to try
            opened = dataset(str(root), download=name != "stanford_cars", **arguments)
            opened[0]  # some import what they need, or miss a file, only here
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            if isinstance(error, ImportError) or "pip install" in str(error):
                raise OSError(
                    f"{name} needs packages: pip install -r requirements-extra.txt ({error})"
                ) from error
            address = getattr(dataset, "url", None) or getattr(dataset, "_URL", None)
            where = (
                f"fetch {address}" if address else f"fetch it as torchvision's {class_name} says"
            )
            raise OSError(
                f"could not open or download {name} ({str(error).splitlines()[0]}); where there "
                f"is no network, {where} and unpack it in {(root / folder).resolve()}"
            ) from error
        if name == "sun397":  # listed as the disk has them; sorted, they are the same everywhere
            pairs = sorted(zip(opened._image_files, opened._labels))
            opened._image_files, opened._labels = map(list, zip(*pairs))
        return opened

    first_class = 3 if name == "clevr_count" else 0  # CLEVR's pictures hold 3 to 10 objects
    train = open_split(train_split)
    if test_split is None:
        fifth = len(train) // 5
        test, train = subset(train, 0, fifth), subset(train, fifth, len(train))
    else:
        test = open_split(test_split)
    if val_split is None:
        fifth = len(train) // 5
        val, train = subset(train, 0, fifth), subset(train, fifth, len(train))
    else:
        val = open_split(val_split)
    augment, plain = transforms(image_size, flip=name != "svhn")  # a flipped digit is no digit
    if name == "clevr_count":  # a crop could cut an object out of its picture
        augment = plain
    return Data(
        Single(train, augment, first_class),
        Single(train, plain, first_class),
        Single(val, plain, first_class),
        Single(test, plain, first_class),
        [classes],
    )


def from_folder(root: Path, image_size: int) -> Data:
    """A folder with train/<class>/ and test/<class>/ pictures; a fifth of train/ validates.

    Every file is opened once, so that a broken picture is named before the training starts.
    """
    splits = []
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise ValueError(f"{root} has no folder {split}/: expected {split}/<class>/ pictures")
        try:
            splits.append(datasets.ImageFolder(str(root / split)))
        except FileNotFoundError as error:  # torchvision's word for no class, or an empty one
            raise ValueError(
                f"{root / split} cannot be used: {str(error).splitlines()[0]}"
            ) from error
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ValueError(f"{root}: class '{odd}' is in only one of train/ and test/")
    for path, _ in train.samples + test.samples:
        try:
            train.loader(path)
        except (OSError, SyntaxError) as error:
            raise OSError(f"{path} is not a picture that can be read: {error}") from error
    augment, plain = transforms(image_size)
    fifth = len(train) // 5
    if not fifth:
        raise ValueError(f"{root} has {len(train)} training pictures; at least 5 are needed")
    rest = subset(train, fifth, len(train))
    return Data(
        Single(rest, augment),
        Single(rest, plain),
        Single(subset(train, 0, fifth), plain),
        Single(test, plain),
        [len(train.classes)],
    )
