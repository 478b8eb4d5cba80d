"""Sets of pictures, read for training: sprites, torchvision's and folders; suites of them.

Each comes back as `Data`: splits of (picture, label) pairs, a picture being 3×H×W bytes and
a label one whole number per factor (most sets have one factor, the class).
[S] SSF, [us] our choice.
"""

import bisect
import json
import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from lab import loop, sprites
from lab.batches import Resident
from lab.checkpoints import in_one_line
from lab.folders import naming, read_splits, to_rgb

# bytes of a split that is kept in memory, decoded once; a larger one is decoded when asked for [us]
MOST_KEPT = 512 * 10**6


class Data(NamedTuple):
    """A data set's splits; `factors` holds the number of classes of each factor, one head for each.

    `plain` is the training split without augmentation, for features that are computed once.
    """

    train: Dataset
    plain: Dataset
    val: Dataset | None
    test: Dataset
    factors: list[int]

    def to(self, device: torch.device) -> "Data":
        """The same, with what is `Resident` on `device`, once where two splits share it."""
        there: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in there:
                there[id(tensor)] = tensor.to(device)
            return there[id(tensor)]

        splits = [
            split.having(move(split.pictures), move(split.labels))
            if isinstance(split, Resident)
            else split
            for split in self[:4]
        ]
        return Data(*splits, self.factors)


def load(
    name: str,
    task: str = "shape",
    data_dir: str = "data",
    image_size: int = 224,
    shots: int | None = None,
    source_size: int = 100_000,
    held_out: float = 0.2,
) -> Data:
    """The data set `name`: 'sprites', a name of TORCHVISION, or a folder with train/ and test/.

    A plain name is first looked for as such a folder below data_dir.
    shots: how many labelled pictures in all, a fifth of them for validation. Which pictures those
    are does not depend on a run's seed. held_out: the share of the training pictures that
    validates where a set has no others for it.
    Raises ValueError for a name, a folder's contents or a number that cannot be used, OSError for
    files that are missing, broken or cannot be downloaded.
    """
    known = VTAB | FGVC | REAL
    below = Path(data_dir) / name
    if name == "sprites":
        data = from_sprites(task, source_size)
        return data if shots is None else take(data, shots)
    if Path(name).name == name != ".." and has_splits(below):
        augment = name not in {*STRUCTURED, "svhn", "gtsrb"}
        return from_folder(below, image_size, augment, held_out, shots)
    if name in TORCHVISION:
        return from_torchvision(name, Path(data_dir), image_size, held_out, shots)
    if Path(name).is_dir():
        return from_folder(Path(name), image_size, True, held_out, shots)
    if name in known:
        raise ValueError(
            f"{name} cannot be downloaded: {known[name][1]}; put its pictures in "
            f"{below}/train/<class>/ and test/<class>/"
        )
    raise ValueError(
        f"data set '{name}' is neither a folder with train/ and test/, here or in {data_dir}, nor "
        f"one of: sprites, {', '.join([*TORCHVISION, *SUITES])}"
    )


def take(data: Data, shots: int) -> Data:
    """Keep `shots` labelled pictures: 80 % for training, 20 % for validation (VTAB-1k's way)."""
    train, val = shots - shots // 5, shots // 5
    if shots < 5 or train > len(data.train) or val > len(data.val):
        raise ValueError(
            f"{shots} labelled pictures are {train} for training and {val} for validation; this "
            f"set has {len(data.train)} and {len(data.val)}; at least 5 in all are needed"
        )
    return data._replace(
        train=subset(data.train, 0, train),
        plain=subset(data.plain, 0, train),
        val=subset(data.val, 0, val),
    )


def unaugmented(data: Data) -> Data:
    """Training pictures as they are, which is how VTAB-1k is trained on [S]."""
    return data._replace(train=data.plain)


def whole(data: Data) -> Data:
    """All labelled pictures to train on, as they are: VTAB-1k's last training, on all 1000.

    None are left to validate with, and nothing can be chosen any more.
    """
    labelled = data.plain + data.val
    return data._replace(train=labelled, plain=labelled, val=None)


def subset(pictures: Dataset, start: int, stop: int) -> Dataset:
    """Pictures start … stop − 1 of one shuffled order that is the same in every run."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[start:stop]
    if isinstance(pictures, Resident):
        return pictures.having(pictures.pictures[order], pictures.labels[order])
    return Subset(pictures, order.tolist())


# ----------------------------------------------------------------------------------------- sprites


def from_sprites(task: str, source_size: int = 100_000) -> Data:
    """Our stand-in for VTAB-1k's structured tasks, drawn on the fly, the same on every machine.

    source: one of six shapes a picture, all FACTORS asked at once; for pre-training.
    shape (6 classes), location (16), orientation (8), count (1 to 5): six other shapes among
    small dots; 800 training, 200 validation and 2000 test pictures.
    """
    if task == "source":
        sizes, factors = (source_size, 2000, 2000), list(sprites.FACTORS.values())
    elif task in sprites.TASKS:
        sizes, factors = (800, 200, 2000), [5 if task == "count" else sprites.FACTORS[task]]
    else:
        names = ", ".join(sprites.TASKS)
        raise ValueError(f"task '{task}' is unknown; choose one of source, {names}")
    # a stream of its own for every task and split, whatever the run's seed
    seeds = [10 * ("source", *sprites.TASKS).index(task) + split for split in range(3)]
    drawn = [sprites.draw(task, n, seed) for n, seed in zip(sizes, seeds)]
    train, val, test = (Resident(*pair, sprites.PIXELS) for pair in drawn)
    return Data(train, train, val, test, factors)


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
    "clevr_dist": ("CLEVRClassification", "clevr", TRAIN, None, VAL, 6),
}
# fmt: on


class Single(Dataset):
    """A set of (picture, class number) pairs as (bytes, one-factor label) pairs."""

    def __init__(self, pictures: Dataset, transform: v2.Transform, first_class: int = 0):
        self.pictures, self.transform, self.first_class = pictures, transform, first_class

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        source, place = self.pictures, i
        while isinstance(source, Subset):
            source, place = source.dataset, source.indices[place]
        with naming(f"picture {place} of {type(source).__name__}"):
            image, label = source[place]
            return self.transform(image), torch.tensor([int(label) - self.first_class])


def transforms(image_size: int) -> tuple[v2.Transform, v2.Transform]:
    """(training, evaluation): a direct resize; training crops lightly, 70 % or more, and flips."""
    train = v2.Compose(
        [
            to_rgb,
            v2.RandomResizedCrop((image_size, image_size), (0.7, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    test = v2.Compose([to_rgb, v2.Resize((image_size, image_size)), v2.PILToTensor()])
    return train, test


def from_torchvision(
    name: str, root: Path, image_size: int, held_out: float = 0.2, shots: int | None = None
) -> Data:
    """A set of torchvision's, downloaded to `root` where it is not there yet.

    A set without a validation split gives the share `held_out` of its training pictures for it,
    and a set without any split (eurosat, caltech101, sun397) first a fifth of all to testing: our
    choice, the same in every run. shots: as for `load`.
    """
    class_name, folder, train_split, val_split, test_split, classes = TORCHVISION[name]
    dataset = getattr(datasets, class_name)

    def open_split(arguments: dict) -> Dataset:
        try:
            # torchvision has no working download for stanford_cars, and refuses to try
            opened = dataset(str(root), download=name != "stanford_cars", **arguments)
            opened[0]  # some import what they need, or miss a file, only here
            if name == "clevr_dist":
                opened._labels = distances(opened)
        except Exception as error:  # torchvision's and Pillow's are no closed list
            if isinstance(error, ImportError) or "pip install" in str(error):
                raise OSError(
                    f"{name} needs packages: pip install -r requirements-extra.txt ({error})"
                ) from error
            address = getattr(dataset, "url", None) or getattr(dataset, "_URL", None)
            where = (
                f"fetch {address}" if address else f"fetch it as torchvision's {class_name} says"
            )
            said = in_one_line(error) or repr(error)
            raise OSError(
                f"could not open or download {name} ({said}); where there "
                f"is no network, {where} and unpack it in {(root / folder).resolve()}"
            ) from error
        if name == "sun397":  # listed as the disk has them; sorted, they are the same everywhere
            pairs = sorted(zip(opened._image_files, opened._labels))
            opened._image_files, opened._labels = map(list, zip(*pairs))
        if isinstance(opened, datasets.CIFAR10 | datasets.SVHN):
            return in_memory(opened, image_size)
        return opened

    train = open_split(train_split)
    if test_split is None:
        fifth = len(train) // 5
        test, train = subset(train, 0, fifth), subset(train, fifth, len(train))
    else:
        test = open_split(test_split)
    if val_split is None:
        count = int(len(train) * held_out)
        val, train = subset(train, 0, count), subset(train, count, len(train))
    else:
        val = open_split(val_split)
    data = Data(train, train, val, test, [classes])
    if shots is not None:
        data = take(data, shots)
    if isinstance(data.train, Resident):
        augment = "crop" if name == "svhn" else "crop+flip"  # a flipped digit is no digit
        return data._replace(train=replace(data.train, augment=augment))
    first_class = 3 if name == "clevr_count" else 0  # CLEVR's pictures hold 3 to 10 objects
    return in_bytes(data, image_size, name not in STRUCTURED, first_class=first_class)


def in_memory(opened: datasets.CIFAR10 | datasets.SVHN, size: int) -> Resident:
    """Pictures that torchvision holds as one array; CIFAR's have their channels last."""
    if isinstance(opened, datasets.SVHN):
        pictures, labels = opened.data, opened.labels
    else:
        pictures, labels = opened.data.transpose(0, 3, 1, 2), opened.targets
    labels = torch.as_tensor(labels).view(-1, 1)
    return Resident(torch.from_numpy(pictures).contiguous(), labels, size)


def distances(opened: datasets.CLEVRClassification) -> list[int]:
    """VTAB's six classes of CLEVR scenes: how far from the camera the nearest object is."""
    file = opened._data_folder / "scenes" / f"CLEVR_{opened._split}_scenes.json"
    nearest = {
        scene["image_filename"]: min(thing["pixel_coords"][2] for thing in scene["objects"])
        for scene in json.loads(file.read_text())["scenes"]
    }
    bounds = (8.0, 8.5, 9.0, 9.5, 10.0)  # what lies on one belongs to the class below, as in VTAB
    return [bisect.bisect_left(bounds, nearest[path.name]) for path in opened._image_files]


def has_splits(folder: Path) -> bool:
    return all((folder / split).is_dir() for split in ("train", "test"))


def from_folder(
    root: Path,
    image_size: int,
    augment: bool = True,
    held_out: float = 0.2,
    shots: int | None = None,
) -> Data:
    """A folder with train/<class>/ and test/<class>/ pictures, as `read_splits` reads it.

    The share `held_out` of train/ validates; shots: as for `load`.
    """
    train, test, classes = read_splits(root)
    count = int(len(train) * held_out)
    if not count:
        raise ValueError(
            f"{root} has {len(train)} training pictures; at least {math.ceil(1 / held_out)} are "
            "needed"
        )
    val, rest = subset(train, 0, count), subset(train, count, len(train))
    data = Data(rest, rest, val, test, [len(classes)])
    if shots is not None:
        data = take(data, shots)
    shape = next(iter(train.sizes))[::-1] if len(train.sizes) == 1 else None
    return in_bytes(data, image_size, augment, shape)


# ----------------------------------------------------------------------- decoded once, where small


def in_bytes(
    data: Data,
    size: int,
    augment: bool,
    shape: tuple[int, int] | None = None,
    first_class: int = 0,
) -> Data:
    """Splits of (PIL picture, class number) → of bytes and labels, kept in memory where small.

    shape: height and width of every training picture, where all have the same. If no side is
    longer than `size`, they are kept as they are, to be augmented in batches.
    """
    augmented, plain = transforms(size)
    rest, val, test = (Single(split, plain, first_class) for split in data[1:4])
    if fits(len(rest) + len(val), size, size):  # the two together, since `whole` joins them
        rest, val = keep(rest, size), keep(val, size)
    if fits(len(test), size, size):
        test = keep(test, size)
    train = rest
    if augment:
        train = Single(data.train, augmented, first_class)
        if shape == (size, size) and isinstance(rest, Resident):
            train = replace(rest, augment="crop+flip")
        elif shape and max(shape) <= size and fits(len(rest), *shape):
            as_it_is = Single(data.train, v2.Compose([to_rgb, v2.PILToTensor()]), first_class)
            train = keep(as_it_is, size, "crop+flip") or train
    return Data(train, rest, val, test, data.factors)


def fits(count: int, height: int, width: int) -> bool:
    return count * 3 * height * width <= MOST_KEPT


def keep(split: Dataset, size: int, augment: str | None = None) -> Resident | None:
    """A split with every picture decoded; None if they turn out to differ in size.

    A header tells the size before a picture is turned as its EXIF tag says.
    """
    numbers = tqdm(range(len(split)), desc="decoding", leave=False)
    pictures, labels = zip(*(split[i] for i in numbers))
    if len({picture.shape for picture in pictures}) > 1:
        return None
    return Resident(torch.stack(pictures), torch.stack(labels), size, augment)


# -------------------------------------------------------------------- VTAB-1k, FGVC and real tasks

# VTAB's 19 tasks in its order, FGVC's five, and six real tasks that suit backbones of 32 px [us]:
# group, and why torchvision cannot give it, if so
MISSING = "torchvision does not have it"
VTAB = {
    "cifar100": ("natural", None),
    "caltech101": ("natural", None),
    "dtd": ("natural", None),
    "flowers102": ("natural", None),
    "oxford_pets": ("natural", None),
    "svhn": ("natural", None),
    "sun397": ("natural", None),
    "pcam": ("specialised", None),
    "eurosat": ("specialised", None),
    "resisc45": ("specialised", MISSING),
    "retinopathy": ("specialised", f"{MISSING}, and Kaggle asks for an account"),
    "clevr_count": ("structured", None),
    "clevr_dist": ("structured", None),
    "dmlab": ("structured", MISSING),
    "kitti_dist": (
        "structured",
        "torchvision has KITTI's training pictures alone, without the videos that VTAB splits by",
    ),
    "dsprites_loc": ("structured", MISSING),
    "dsprites_ori": ("structured", MISSING),
    "smallnorb_azi": ("structured", MISSING),
    "smallnorb_ele": ("structured", MISSING),
}
FGVC = {
    "cub200": ("fine-grained", MISSING),
    "nabirds": ("fine-grained", MISSING),
    "flowers102": ("fine-grained", None),
    "stanford_dogs": ("fine-grained", MISSING),
    "stanford_cars": ("fine-grained", None),
}
REAL = {
    "cifar100": ("natural", None),
    "cifar10": ("natural", None),
    "caltech101": ("natural", None),
    "aid": ("specialised", MISSING),
    "bloodcells": ("specialised", MISSING),
    "gtsrb": ("signs", "torchvision's files of it are not read here"),
}
# a crop or a flip would change what is asked: place, direction, distance or number
STRUCTURED = {name for name, (group, _) in VTAB.items() if group == "structured"}
SUITES = {"vtab": VTAB, "fgvc": FGVC, "real": REAL}


def suite(name: str, data_dir: str = "data") -> tuple[list[str], dict[str, str]]:
    """Which tasks of "vtab", "fgvc" or "real" can be loaded, and why each of the others cannot.

    A task can be where torchvision has it, or where `<data_dir>/<task>/` is a folder with
    train/<class>/ and test/<class>/ pictures; whether a download succeeds is not tried.

    The protocol is VTAB-1k's: take(data, 1000), for 800 to train on and 200 to choose by, then
    `whole`. Not VTAB's own are [us]: the 1000 pictures, which are the first of our shuffled order;
    the test pictures of eurosat, caltech101 and sun397, a random fifth; caltech101's classes,
    torchvision's 101 without the background. FGVC's sets have a fifth for validation where they
    bring none, and so have those of "real", six real tasks for small backbones.
    """
    left_out = {
        task: reason
        for task, (_, reason) in SUITES[name].items()
        if reason and not has_splits(Path(data_dir) / task)
    }
    return [task for task in SUITES[name] if task not in left_out], left_out


# ---------------------------------------------------------------------------- what the flags name


def set_name(args: Namespace) -> str:
    """How files and tables call the data set: sprites-shape, cifar100 or the folder's name."""
    if args.dataset == "sprites":
        return f"sprites-{args.task}"
    return Path(args.dataset).resolve().name


def load_named(args: Namespace, size: int) -> Data:
    """The data set that the flags name, on their device, for a model that reads size×size."""
    if args.dataset == "sprites" and size != sprites.PIXELS:
        raise ValueError(
            f"sprites are {sprites.PIXELS} px, and this model reads {size}; take a micro model, "
            "without --image-size"
        )
    shots = 1000 if args.protocol else args.shots
    held_out = 0.02 if args.pretrain else 0.2
    data = load(args.dataset, args.task, args.data_dir, size, shots, held_out=held_out)
    return (unaugmented(data) if args.protocol else data).to(args.device)


@dataclass
class Task:
    """A data set as a table calls it, the flags that load it, the group it is averaged with."""

    name: str
    args: Namespace
    group: str | None
    lacking: bool = False  # tried, and not to be had

    def load(self, size: int) -> Data:
        """As `load_named`; what it raises is remembered."""
        try:
            data = load_named(self.args, size)
        except (OSError, ValueError):
            self.lacking = True
            raise
        sizes = f"{len(data.train)} + {len(data.val)} labelled, {len(data.test)} to test"
        print(f"{self.name}: {sizes}")
        return data


def tasks_named(args: Namespace) -> list[Task]:
    """The tasks of a table that the flags ask for; what is left out of a suite is said."""
    names, left_out = [args.dataset], {}
    if args.dataset in SUITES:
        names, left_out = suite(args.dataset, args.data_dir)
    for name, reason in left_out.items():
        print(
            f"left out: {name}, {reason}; as a folder {Path(args.data_dir) / name}/ it takes part"
        )
    groups = SUITES.get(args.dataset, VTAB if args.protocol else {})
    tasks = sprites.TASKS if args.dataset == "sprites" and args.task == "all" else [args.task]
    sets = [loop.changed(args, dataset=name, task=task) for name in names for task in tasks]
    return [Task(set_name(own), own, groups.get(own.dataset, (None,))[0]) for own in sets]
