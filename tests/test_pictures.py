"""lab/pictures.py: sprites ask what they say they ask, real sets arrive with the right labels.

Batches made in memory are what torchvision's transforms make of single pictures.
"""

import hashlib
import json
import math
import pickle
import re
import sys
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torchvision.transforms import v2

from lab import batches, sprites
from lab import pictures as sets

ALL_TASKS = ["source", *sprites.TASKS]
CLASSES = {"shape": 6, "location": 16, "orientation": 8, "count": 5}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# ------------------------------------------------------------------------------------ sprites


@cache
def loaded(task: str) -> sets.Data:
    return sets.load("sprites", task=task, source_size=3000)


def tensors(split: batches.Resident) -> tuple[torch.Tensor, torch.Tensor]:
    assert split.size == 32 and split.augment is None
    return split.pictures, split.labels


@pytest.mark.parametrize(
    "task, digest",
    [
        ("source", "8906de8c55a5d037"),
        ("shape", "ed9bfe67ebe19983"),
        ("location", "060df29c84a5f4fa"),
        ("orientation", "05743783b0752b2a"),
        ("count", "1fed579e76b87deb"),
    ],
)
def test_sprites_are_the_same_bytes_on_every_machine(task, digest):
    images, labels = sprites.draw(task, 20, seed=7)
    content = images.numpy().tobytes() + labels.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_another_seed_draws_other_sprites():
    assert not torch.equal(
        sprites.draw("shape", 20, seed=1)[0], sprites.draw("shape", 20, seed=2)[0]
    )


@pytest.mark.parametrize("task", sprites.TASKS)
def test_a_target_task_has_800_200_and_2000_pictures(task):
    splits = loaded(task)
    sizes = [len(splits.train), len(splits.plain), len(splits.val), len(splits.test)]
    assert sizes == [800, 800, 200, 2000]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_sprites_are_bytes_of_32_by_32_and_one_whole_number_a_factor(task):
    for split in (loaded(task).train, loaded(task).val, loaded(task).test):
        images, labels = tensors(split)
        assert images.shape == (len(split), 3, 32, 32) and images.dtype == torch.uint8
        assert labels.shape == (len(split), len(loaded(task).factors))
        assert labels.dtype == torch.long


@pytest.mark.parametrize("task", ALL_TASKS)
def test_every_class_of_every_factor_is_about_as_frequent_as_the_others(task):
    expected = [6, 8, 3, 4, 8, 16, 3] if task == "source" else [CLASSES[task]]
    assert loaded(task).factors == expected
    for split in (loaded(task).train, loaded(task).val, loaded(task).test):
        for column, classes in zip(tensors(split)[1].T, expected):
            counts = column.bincount(minlength=classes)
            mean = len(split) / classes
            assert len(counts) == classes and counts.min() > 0
            assert (counts - mean).abs().max() < 4.5 * math.sqrt(mean)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_no_picture_is_in_two_splits(task):
    images = [*loaded(task)[:1], *loaded(task)[2:4]]
    seen = [image.numpy().tobytes() for split in images for image in tensors(split)[0]]
    assert len(set(seen)) == len(seen)


def test_an_unknown_task_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'colour'.*source.*shape.*location.*orientation.*count"):
        sets.load("sprites", task="colour")


@cache
def silhouette(index: int, eighths: int = 0) -> torch.Tensor:
    """Which of 64×64 points lie in shape `index` (targets after sources), turned by eighths."""
    line = (torch.arange(64, dtype=torch.float64) + 0.5) / 64 * 2.6 - 1.3
    v, u = torch.meshgrid(line, line, indexing="ij")
    cos, sin = math.cos(eighths * math.pi / 4), math.sin(eighths * math.pi / 4)
    return (sprites.SOURCE_SHAPES + sprites.TARGET_SHAPES)[index](
        cos * u + sin * v, cos * v - sin * u
    ) < 0


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union: 1 for the same silhouette."""
    return ((one & other).sum() / (one | other).sum()).item()


@pytest.mark.parametrize("index", range(12))
def test_a_shape_differs_from_itself_turned_so_that_its_orientation_is_defined(index):
    assert max(overlap(silhouette(index), silhouette(index, k)) for k in range(1, 8)) < 0.8


@pytest.mark.parametrize("index", range(12))
def test_a_shape_differs_from_every_other_shape_however_it_is_turned(index):
    others = [silhouette(i, k) for i in range(12) for k in range(8) if i != index]
    assert max(overlap(silhouette(index), other) for other in others) < 0.8


def test_source_and_target_have_six_shapes_each():
    assert len(sprites.SOURCE_SHAPES) == len(sprites.TARGET_SHAPES) == 6


@pytest.fixture
def drawing(monkeypatch):
    """Draws pictures, and gives the area that each thing laid on the background covers."""

    def draw(task: str, shapes=None) -> tuple[list[torch.Tensor], torch.Tensor]:
        covers, mix = [], sprites.mix

        def recording_mix(below, cover, above):
            covers.append(cover)
            return mix(below, cover, above)

        with monkeypatch.context() as patch:
            patch.setattr(sprites, "mix", recording_mix)
            if shapes:
                patch.setattr(sprites, "SOURCE_SHAPES", shapes)
                patch.setattr(sprites, "TARGET_SHAPES", shapes)
            labels = sprites.draw(task, 300, seed=5)[1]
        return covers, labels

    return draw


def centre(cover: torch.Tensor) -> torch.Tensor:
    """The centre of mass of n×32×32 coverages, n×2: to the right and downward, in pixels."""
    line = torch.arange(32, dtype=torch.float64) + 0.5
    mass = cover.sum((1, 2))
    return torch.stack([cover.sum(1) @ line / mass, cover.sum(2) @ line / mass], dim=1)


def dots(u: float, v: float) -> list:
    """Six shapes that are all one small disc, so that a cover's centre is an exact place."""
    return [lambda x, y: sprites.disc(x, y, u, v, 0.2)] * 6


@pytest.mark.parametrize("task, laid", [("source", 1), ("shape", 7), ("count", 11)])
def test_targets_are_cluttered_with_dots_and_the_source_is_not(drawing, task, laid):
    covers, _ = drawing(task)
    assert len(covers) == laid
    if task != "source":
        dot_sizes = torch.stack([cover.sum((1, 2)) for cover in covers[:6]])
        assert (dot_sizes > 0).float().mean() > 0.9
        assert dot_sizes.max() < 10  # pixels: no dot is taken for an object


@pytest.mark.parametrize("task, column", [("location", 0), ("source", 5)])
def test_the_location_label_is_the_cell_that_holds_the_object(drawing, task, column):
    covers, labels = drawing(task, dots(0, 0))
    cell = ((centre(covers[-1]) - 4) / 6).floor().long()
    near_an_edge = ((centre(covers[-1]) - 4) % 6 - 3).abs().amax(1) > 2.9
    assert near_an_edge.float().mean() < 0.15
    found = cell[:, 1] * 4 + cell[:, 0]
    assert torch.equal(found[~near_an_edge], labels[~near_an_edge, column])


@pytest.mark.parametrize("task, column", [("orientation", 0), ("source", 4)])
def test_the_orientation_label_is_the_eighth_by_which_the_object_is_turned(drawing, task, column):
    at_centre, labels = drawing(task, dots(0, 0))
    to_the_right, _ = drawing(task, dots(0.4, 0))
    start = centre(at_centre[-1])
    way = centre(to_the_right[-1]) - start
    eighths = (torch.atan2(-way[:, 1], way[:, 0]) / (math.pi / 4)).round().long() % 8
    whole = ((start > 6) & (start < 26)).all(1)  # the border cuts neither dot
    assert whole.float().mean() > 0.6
    assert torch.equal(eighths[whole], labels[whole, column])


@pytest.mark.parametrize("task, column", [("shape", 0), ("source", 0)])
def test_the_shape_label_is_the_shape_that_is_drawn(drawing, task, column):
    radii = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85]
    discs = [lambda u, v, r=r: sprites.disc(u, v, 0, 0, r) for r in radii]
    labels = drawing(task, discs)[1][:, column]
    for index in range(6):
        only_one = [lambda u, v: torch.ones_like(u)] * 6
        only_one[index] = discs[index]
        visible = drawing(task, only_one)[0][-1].sum((1, 2)) > 0
        assert torch.equal(visible, labels == index)


def test_the_count_label_is_the_number_of_objects_less_one(drawing):
    covers, labels = drawing("count")
    objects = torch.stack(covers[6:])
    visible = (objects.sum((2, 3)) > 5).sum(0)
    assert torch.equal(visible, labels[:, 0] + 1)
    assert ((objects > 0.5).sum(0) <= 1).all()  # and none hides another


# ------------------------------------------------------------------------------- shots, inputs


def numbered(train: int, val: int) -> sets.Data:
    """A set whose pictures are their own numbers: training from 0, validation from 1000."""
    split = TensorDataset(torch.arange(train))
    return sets.Data(split, split, TensorDataset(torch.arange(1000, 1000 + val)), split, [2])


def numbers(split) -> list[int]:
    return [int(item[0]) for item in split]


@pytest.mark.parametrize("shots, train, val", [(5, 4, 1), (100, 80, 20), (1000, 800, 200)])
def test_shots_are_four_fifths_training_and_one_fifth_validation(shots, train, val):
    taken = sets.take(numbered(800, 200), shots)
    assert (len(taken.train), len(taken.plain), len(taken.val)) == (train, train, val)
    assert len(set(numbers(taken.train))) == train and max(numbers(taken.train)) < 1000
    assert len(set(numbers(taken.val))) == val and min(numbers(taken.val)) >= 1000
    assert len(taken.test) == 800


def test_shots_are_the_same_pictures_whatever_the_runs_seed():
    torch.manual_seed(1)
    one = sets.take(numbered(800, 200), 100)
    torch.manual_seed(2)
    other = sets.take(numbered(800, 200), 100)
    assert numbers(one.train) == numbers(other.train) == numbers(one.plain)
    assert numbers(one.val) == numbers(other.val)
    assert numbers(one.train) != list(range(80))  # drawn from everywhere, not the first ones


@pytest.mark.parametrize(
    "shots, named", [(1005, "804.*800"), (1500, "1200.*800"), (4, "at least 5"), (0, "at least 5")]
)
def test_shots_that_cannot_be_had_are_refused_with_both_numbers(shots, named):
    with pytest.raises(ValueError, match=f"{shots}.*{named}"):
        sets.take(numbered(800, 200), shots)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_both_transforms_give_three_channels_for_every_colour_mode(mode):
    for transform in sets.transforms(image_size=24):
        image = transform(Image.new("RGB", (20, 10), "white").convert(mode))
        assert image.shape == (3, 24, 24) and image.dtype == torch.uint8 and image.min() > 250


def test_load_takes_the_shots():
    assert len(sets.load("sprites", shots=50).train) == 40


def test_inputs_are_scaled_by_imagenets_mean_and_deviation():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    black, white = batches.to_input(images)[:, :, 0, 0]
    assert torch.allclose(black, torch.tensor([-2.1179, -2.0357, -1.8044]), atol=1e-3)
    assert torch.allclose(white, torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-3)


# ----------------------------------------------------------------------------- pictures in memory


def noise(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def in_memory(count: int = 20, size: int = 32, augment: str | None = None) -> batches.Resident:
    """Noise, the labels two factors: a picture's number and the one after it."""
    numbers = torch.arange(count)
    return batches.Resident(noise(count), torch.stack([numbers, numbers + 1], 1), size, augment)


def drawn(resident: batches.Resident, sampler: type) -> DataLoader:
    order = BatchSampler(sampler(resident), 8, False)
    return DataLoader(resident, sampler=order, batch_size=None)


def grey_levels(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest difference between two pictures of the same size."""
    assert one.dtype == other.dtype == torch.uint8 and one.shape == other.shape
    return (one.int() - other.int()).abs().max().item()


@pytest.mark.parametrize("sampler, shuffle", [(RandomSampler, True), (SequentialSampler, False)])
def test_batches_in_memory_are_those_of_a_dataset_of_single_pictures(sampler, shuffle):
    resident = in_memory()
    single = DataLoader(TensorDataset(resident.pictures, resident.labels), 8, shuffle)
    whole = drawn(resident, sampler)
    assert len(whole) == len(single) == 3 and len(whole.dataset) == 20
    seen = []
    for loader in (single, whole):
        torch.manual_seed(4)
        seen.append([batch for _ in range(2) for batch in loader] + [torch.rand(1)])
    for expected, found in zip(*seen, strict=True):
        assert all(map(torch.equal, expected, found))


def test_crops_lie_in_the_picture_and_have_the_area_and_aspect_they_should():
    left, top, width, height = boxes = batches.crops(5000).T
    assert boxes.min() >= 0 and (left + width).max() < 1.00001 and (top + height).max() < 1.00001
    area, aspect = width * height, width / height
    assert area.min() > 0.69999 and area.max() < 1.00001
    assert aspect.min() > 0.74999 and aspect.max() < 1.33334
    assert area.min() < 0.71 and area.max() > 0.99 and aspect.log().mean().abs() < 0.02
    assert left.mean().sub(top.mean()).abs() < 0.01 and (left + width / 2 - 0.5).mean().abs() < 0.01


EVERYTHING = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


@pytest.mark.parametrize("size", [32, 40, 64])
def test_a_crop_of_the_whole_picture_is_its_resize_and_a_flip_mirrors_it(size):
    pictures, boxes = noise(4), EVERYTHING.expand(4, 4)
    flips = torch.tensor([False, True, False, True])
    seen = batches.cut_out(pictures, batches.view(boxes, flips), size)
    expected = batches.resize(pictures, size)
    assert grey_levels(seen[~flips], expected[~flips]) <= 1
    assert grey_levels(seen[flips], expected[flips].flip(3)) <= 1


def test_a_crop_shows_what_lies_in_its_box_for_every_picture_its_own():
    pictures = noise(3)
    corners = [(8, 4), (0, 16), (16, 0)]  # from the left, from the top
    boxes = torch.tensor([[left / 32, top / 32, 0.5, 0.5] for left, top in corners])
    seen = batches.cut_out(pictures, batches.view(boxes, torch.zeros(3, dtype=torch.bool)), 16)
    for picture, shown, (left, top) in zip(pictures, seen, corners):
        assert torch.equal(shown, picture[:, top : top + 16, left : left + 16])


@pytest.mark.parametrize("size", [16, 24, 32, 48, 224])
def test_a_resize_is_torchvisions(size):
    pictures = noise(2, height=32, width=40)
    theirs = v2.Compose([v2.ToPILImage(), v2.Resize((size, size)), v2.PILToTensor()])
    expected = torch.stack([theirs(picture) for picture in pictures])
    resident = batches.Resident(pictures, torch.zeros(2, 1), size)
    assert grey_levels(resident[[0, 1]][0], expected) <= 1


@pytest.mark.parametrize("augment", [None, "crop", "crop+flip"])
def test_labels_stay_with_their_pictures(augment):
    resident = in_memory(40, 48, augment)
    resident.pictures = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 32, 32)
    for pictures, labels in drawn(resident, RandomSampler):
        assert pictures.shape[1:] == (3, 48, 48) and pictures.dtype == torch.uint8
        assert (pictures == labels[:, 0].view(-1, 1, 1, 1)).all()
        assert torch.equal(labels[:, 1], labels[:, 0] + 1)


def test_every_picture_is_augmented_for_itself_and_a_seed_says_how():
    resident = in_memory(augment="crop+flip")
    resident.pictures[:] = noise(1)
    torch.manual_seed(0)
    one, other = resident[list(range(10))][0], resident[list(range(10))][0]
    assert len({picture.numpy().tobytes() for picture in [*one, *other]}) == 20
    torch.manual_seed(0)
    assert torch.equal(resident[list(range(10))][0], one)


def test_shots_of_pictures_in_memory_stay_there_and_are_those_of_any_other_set():
    def taken(split: Dataset) -> sets.Data:
        return sets.take(sets.Data(split, split, split, split, [20]), 15)

    resident = in_memory(size=40, augment="crop")
    mine, others = taken(resident), taken(TensorDataset(resident.pictures, resident.labels))
    for part, other in zip(mine[:3], others[:3]):
        assert isinstance(part, batches.Resident) and (part.size, part.augment) == (40, "crop")
        assert part.labels.tolist() == [label.tolist() for _, label in other]
        assert torch.equal(part.pictures, torch.stack([picture for picture, _ in other]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it watches a GPU")
@pytest.mark.parametrize("augment", [None, "crop", "crop+flip"])
def test_a_gpu_makes_the_cpus_batches_and_the_host_never_waits_for_it(augment):
    resident = in_memory(size=48, augment=augment)
    split = resident.to(torch.device("cuda"))
    batches.to_input(split[[0]][0])  # what is set up once may wait
    seen = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for own in (resident, split):
            torch.manual_seed(0)
            seen.append(list(drawn(own, RandomSampler)))
            batches.to_input(seen[-1][0][0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (pictures, labels), (there, labels_there) in zip(*seen, strict=True):
        assert there.is_cuda and grey_levels(there.cpu(), pictures) <= 1
        assert torch.equal(labels_there.cpu(), labels)


# -------------------------------------------------------- small copies of sets of real pictures


class Picture(NamedTuple):
    """One picture of a small set; its colour tells all three, so that a test reads them back."""

    serial: int
    split: str
    label: int

    def paint(self) -> Image.Image:
        colour = (20 * self.label + 10, 80 * SPLITS.index(self.split) + 10, 8 * self.serial + 4)
        return Image.new("RGB", (32, 32), colour)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.paint().save(path, quality=100)


SPLITS = ("train", "val", "test")


def dark_on_the_left() -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 16, 32))
    return image


def each(split: Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A split's pictures one by one, with their labels."""
    if isinstance(split, batches.Resident):
        return list(zip(*split[list(range(len(split)))]))
    return [split[i] for i in range(len(split))]


def read_back(split: Dataset) -> list[Picture]:
    """The pictures of a loaded split, from their colours; their labels must agree."""
    pictures = []
    for image, label in each(split):
        red, green, blue = image.float().mean((1, 2)).tolist()
        picture = Picture(int(blue // 8), SPLITS[int(green // 80)], int(red // 20))
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert label.tolist() == [picture.label]
        pictures.append(picture)
    return pictures


def some_pictures(classes: int, **sizes: int) -> list[Picture]:
    """`sizes` pictures a split, the classes in turn."""
    splits = [split for split, size in sizes.items() for _ in range(size)]
    return [Picture(i, split, i % classes) for i, split in enumerate(splits)]


def of(pictures: list[Picture], split: str) -> list[Picture]:
    return [picture for picture in pictures if picture.split == split]


# Each function writes a small set as its authors ship it, in the folder that torchvision reads.


def write_cifar_file(path: Path, pictures: list[Picture], key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.asarray(picture.paint()).transpose(2, 0, 1).ravel() for picture in pictures]
    labels = [picture.label for picture in pictures]
    path.write_bytes(pickle.dumps({"data": np.array(rows), key: labels}))


def write_cifar10(root: Path, pictures: list[Picture]) -> None:
    folder = root / "cifar-10-batches-py"
    for i in range(5):
        write_cifar_file(folder / f"data_batch_{i + 1}", of(pictures, "train")[i::5], "labels")
    write_cifar_file(folder / "test_batch", of(pictures, "test"), "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))


def write_cifar100(root: Path, pictures: list[Picture]) -> None:
    folder = root / "cifar-100-python"
    for split in ("train", "test"):
        write_cifar_file(folder / split, of(pictures, split), "fine_labels")
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}))


def write_svhn(root: Path, pictures: list[Picture]) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="svhn's .mat files need scipy")
    for split in ("train", "test"):
        images = np.stack([np.asarray(p.paint()) for p in of(pictures, split)], axis=3)
        digits = np.array([[p.label or 10] for p in of(pictures, split)])  # 10 stands for 0
        scipy_io.savemat(root / f"{split}_32x32.mat", {"X": images, "y": digits})


def write_flowers102(root: Path, pictures: list[Picture]) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="flowers102's .mat files need scipy")
    folder, names = root / "flowers-102", {"train": "trnid", "val": "valid", "test": "tstid"}
    for picture in pictures:
        picture.save(folder / "jpg" / f"image_{picture.serial + 1:05d}.jpg")
    ids = {names[s]: [p.serial + 1 for p in of(pictures, s)] for s in SPLITS}
    scipy_io.savemat(folder / "setid.mat", ids)
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": [p.label + 1 for p in pictures]})


def write_oxford_pets(root: Path, pictures: list[Picture]) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, name in (("train", "trainval.txt"), ("test", "test.txt")):
        lines = []
        for picture in of(pictures, split):
            image = f"breed_{'ab'[picture.label]}_{picture.serial}"
            picture.save(folder / "images" / f"{image}.jpg")
            lines.append(f"{image} {picture.label + 1} 1 1\n")
        (folder / "annotations" / name).write_text("".join(lines))


def write_dtd(root: Path, pictures: list[Picture]) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split in SPLITS:
        names = [f"{'ab'[p.label]}/{p.serial}.jpg" for p in of(pictures, split)]
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names))
        for name, picture in zip(names, of(pictures, split)):
            picture.save(folder / "images" / name)


def write_eurosat(root: Path, pictures: list[Picture]) -> None:
    for picture in pictures:
        picture.save(root / "eurosat" / "2750" / "ab"[picture.label] / f"{picture.serial}.jpg")


def write_food101(root: Path, pictures: list[Picture]) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        names = {"a": [], "b": []}
        for picture in of(pictures, split):
            names["ab"[picture.label]].append(f"{'ab'[picture.label]}/{picture.serial}")
            picture.save(folder / "images" / f"{'ab'[picture.label]}/{picture.serial}.jpg")
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))


def write_stanford_cars(root: Path, pictures: list[Picture]) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="stanford_cars' .mat files need scipy")
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    scipy_io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": ["a", "b"]})
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, file in files.items():
        rows = [(f"{p.serial}.jpg", p.label + 1) for p in of(pictures, split)]
        rows = np.array(rows, dtype=[("fname", object), ("class", object)])
        scipy_io.savemat(folder / file, {"annotations": rows})
        for picture in of(pictures, split):
            picture.save(folder / f"cars_{split}" / f"{picture.serial}.jpg")


def write_caltech101(root: Path, pictures: list[Picture]) -> None:
    pytest.importorskip("scipy.io", reason="torchvision's Caltech101 imports scipy")
    folder = root / "caltech101" / "101_ObjectCategories"
    (folder / "BACKGROUND_Google").mkdir(parents=True)
    for picture in pictures:
        number = picture.serial // 2 + 1  # each of the two classes counts from 1
        picture.save(folder / "ab"[picture.label] / f"image_{number:04d}.jpg")


def write_sun397(root: Path, pictures: list[Picture]) -> None:
    for picture in pictures:
        picture.save(root / "SUN397" / "a" / "ab"[picture.label] / f"sun_{picture.serial}.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("/a/a\n/a/b\n")


def write_clevr(root: Path, pictures: list[Picture], things: Callable[[int], list]) -> None:
    """`things` makes a scene's objects for a label.

    CLEVR's own test pictures carry no scenes, so its validation split is ours for testing.
    """
    folder = root / "clevr" / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for split, theirs in (("train", "train"), ("test", "val")):
        scenes = []
        for picture in of(pictures, split):
            name = f"CLEVR_{theirs}_{picture.serial:06d}.png"
            picture.save(folder / "images" / theirs / name)
            scenes.append({"image_filename": name, "objects": things(picture.label)})
        file = folder / "scenes" / f"CLEVR_{theirs}_scenes.json"
        file.write_text(json.dumps({"scenes": scenes}))


def write_clevr_count(root: Path, pictures: list[Picture]) -> None:
    write_clevr(root, pictures, lambda label: [{}] * (label + 3))


def write_clevr_dist(root: Path, pictures: list[Picture], nearest=(5, 8.1, 9, 9.1, 10, 13)) -> None:
    def things(label: int) -> list:
        return [{"pixel_coords": [3, 400, depth]} for depth in (14.5, nearest[label], 13.5)]

    write_clevr(root, pictures, things)


@pytest.fixture
def small_set(tmp_path, monkeypatch):
    """Writes a small copy of a set, whose checksums are those of nothing, and loads it."""
    for name in ("cifar", "svhn", "flowers102", "utils"):
        module = getattr(torchvision.datasets, name)
        monkeypatch.setattr(module, "check_integrity", lambda path, md5: Path(path).is_file())

    def load(write, pictures: list[Picture], **options) -> sets.Data:
        write(tmp_path, pictures)
        name = write.__name__.removeprefix("write_")
        return sets.load(name, data_dir=str(tmp_path), image_size=32, **options)

    return load


TRAIN_AND_TEST = [
    (write_cifar10, 10),
    (write_cifar100, 100),
    (write_svhn, 10),
    (write_oxford_pets, 37),
    (write_food101, 101),
    (write_stanford_cars, 196),
]


@pytest.mark.parametrize("write, classes", TRAIN_AND_TEST)
def test_a_set_without_validation_gives_a_fifth_of_its_training_pictures(write, classes, small_set):
    pictures = some_pictures(2, train=20, test=6)
    loaded = small_set(write, pictures)
    assert loaded.factors == [classes]
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    val = read_back(loaded.val)
    assert len(val) == 4
    assert sorted(val + read_back(loaded.plain)) == of(pictures, "train")
    assert read_back(loaded.train) == read_back(loaded.plain)


@pytest.mark.parametrize("write, classes", [(write_dtd, 47), (write_flowers102, 102)])
def test_a_set_with_its_own_validation_keeps_it(write, classes, small_set):
    pictures = some_pictures(2, train=8, val=4, test=6)
    loaded = small_set(write, pictures)
    assert loaded.factors == [classes]
    assert sorted(read_back(loaded.plain)) == of(pictures, "train")
    assert sorted(read_back(loaded.val)) == of(pictures, "val")
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    assert read_back(loaded.train) == read_back(loaded.plain)


@pytest.mark.parametrize(
    "write, classes", [(write_eurosat, 10), (write_caltech101, 101), (write_sun397, 397)]
)
def test_a_set_without_splits_gives_each_picture_to_one_of_the_three(write, classes, small_set):
    pictures = some_pictures(2, train=25)
    loaded = small_set(write, pictures)
    assert loaded.factors == [classes]
    splits = [read_back(split) for split in (loaded.plain, loaded.val, loaded.test)]
    assert [len(split) for split in splits] == [16, 4, 5]
    assert sorted(sum(splits, [])) == pictures


def test_a_set_without_splits_does_not_depend_on_the_order_the_disk_lists_files_in(
    small_set, monkeypatch
):
    pictures = some_pictures(2, train=25)
    rglob = Path.rglob
    tests = []
    for reverse in (False, True):
        monkeypatch.setattr(Path, "rglob", lambda *a, r=reverse: iter(sorted(rglob(*a), reverse=r)))
        tests.append(read_back(small_set(write_sun397, pictures).test))
    assert tests[0] == tests[1]


def test_clevrs_counts_of_3_to_10_are_the_classes_0_to_7(small_set):
    pictures = some_pictures(8, train=20, test=8)
    loaded = small_set(write_clevr_count, pictures)
    assert loaded.factors == [8]
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    assert sorted(label.item() for _, label in each(loaded.test)) == list(range(8))
    assert sorted(read_back(loaded.val) + read_back(loaded.plain)) == of(pictures, "train")


def test_clevrs_distances_are_six_classes_and_the_nearest_object_counts(small_set):
    pictures = some_pictures(6, train=20, test=6)
    loaded = small_set(write_clevr_dist, pictures)
    assert loaded.factors == [6]
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    assert sorted(label.item() for _, label in each(loaded.test)) == list(range(6))
    assert sorted(read_back(loaded.val) + read_back(loaded.plain)) == of(pictures, "train")


@pytest.mark.parametrize("write", [write_clevr_count, write_clevr_dist])
def test_a_scene_is_neither_cropped_nor_flipped(write, small_set, monkeypatch):
    monkeypatch.setattr(Picture, "paint", lambda _: dark_on_the_left())
    for image, _ in each(small_set(write, some_pictures(2, train=10, test=2)).train):
        assert torch.equal(image, v2.functional.pil_to_tensor(dark_on_the_left()))


@pytest.mark.parametrize("write", [write_cifar10, write_cifar100, write_svhn])
def test_small_pictures_stay_in_memory_and_are_the_files_bytes(write, small_set):
    pictures = some_pictures(2, train=20, test=6)
    loaded = small_set(write, pictures)
    assert all(isinstance(split, batches.Resident) for split in loaded[:4])
    for (image, _), picture in zip(each(loaded.test), of(pictures, "test"), strict=True):
        assert torch.equal(image, v2.functional.pil_to_tensor(picture.paint()))


@pytest.mark.parametrize("write, mirrored", [(write_cifar10, True), (write_svhn, False)])
def test_training_pictures_are_mirrored_at_random_but_digits_never(
    write, mirrored, small_set, monkeypatch
):
    monkeypatch.setattr(Picture, "paint", lambda _: dark_on_the_left())
    train = small_set(write, some_pictures(2, train=40, test=2)).train
    dark_on_the_right = [image[0, 16, -1] < image[0, 16, 0] for image, _ in each(train)]
    assert any(dark_on_the_right) == mirrored
    assert not all(dark_on_the_right)


def test_every_torchvision_set_of_the_contract_can_be_chosen():
    names = "cifar10 cifar100 svhn flowers102 oxford_pets dtd eurosat food101 stanford_cars "
    names += "caltech101 sun397 pcam clevr_count clevr_dist"
    assert set(sets.TORCHVISION) == set(names.split())


def test_an_unknown_data_set_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'cifar1000'.*sprites.*cifar10, cifar100.*clevr_count"):
        sets.load("cifar1000")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("cifar10", ""),
        ("cifar100", ""),
        ("svhn", ""),
        ("food101", ""),
        ("sun397", ""),
        ("dtd", "dtd"),  # dtd-r1.0.1.tar.gz holds dtd/, and torchvision reads dtd/dtd/
        ("clevr_count", "clevr"),
        ("clevr_dist", "clevr"),
        ("eurosat", "eurosat"),
        ("oxford_pets", "oxford-iiit-pet"),
        ("flowers102", "flowers-102"),
        ("caltech101", "caltech101"),
    ],
)
def test_without_network_the_error_says_into_which_folder_to_unpack(name, folder, tmp_path):
    place = re.escape(str(tmp_path / folder))
    with pytest.raises(OSError, match=rf"{name}.*{place}(?![\w/-])") as caught:
        sets.load(name, data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_network_the_error_says_what_to_fetch(tmp_path):
    with pytest.raises(OSError, match=re.escape(torchvision.datasets.CIFAR100.url)):
        sets.load("cifar100", data_dir=str(tmp_path))


@pytest.fixture
def without_scipy(monkeypatch):
    class NoScipy:
        def find_spec(name, *_):
            if name.split(".")[0] == "scipy":
                raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoScipy, *sys.meta_path])


@pytest.mark.parametrize(
    "name, files",
    [
        ("svhn", ["train_32x32.mat"]),
        ("flowers102", ["flowers-102/imagelabels.mat", "flowers-102/setid.mat"]),
        ("caltech101", []),
        ("stanford_cars", []),
    ],
)
def test_a_set_that_needs_scipy_says_so_where_it_is_missing(
    name, files, small_set, without_scipy, tmp_path
):
    (tmp_path / "flowers-102" / "jpg").mkdir(parents=True)
    for file in files:
        (tmp_path / file).touch()
    for category in ("a", "BACKGROUND_Google"):
        Picture(0, "train", 0).save(
            tmp_path / "caltech101" / "101_ObjectCategories" / category / "image_0001.jpg"
        )
    with pytest.raises(OSError, match=rf"(?i){name}.*pip install.*scipy"):
        sets.load(name, data_dir=str(tmp_path))


# ------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path):
    """A folder data set of 20 + 6 pictures, half of them PNG, of the classes cat and dog."""
    for picture in some_pictures(2, train=20, test=6):
        kind = "png" if picture.serial % 4 < 2 else "jpg"
        name = ("cat", "dog")[picture.label]
        picture.save(tmp_path / "pets" / picture.split / name / f"{picture.serial}.{kind}")
    return tmp_path / "pets"


def load_folder(folder: Path, **options) -> sets.Data:
    return sets.load(str(folder), image_size=32, **options)


def test_a_folder_gives_its_classes_and_a_fifth_of_train_for_validation(folder):
    pictures = some_pictures(2, train=20, test=6)
    loaded = load_folder(folder)
    assert loaded.factors == [2]
    assert len(loaded.val) == 4
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    assert sorted(read_back(loaded.val) + read_back(loaded.plain)) == of(pictures, "train")
    assert read_back(loaded.train) == read_back(loaded.plain)


def test_a_folder_gives_the_same_validation_pictures_in_every_run(folder):
    torch.manual_seed(1)
    one = read_back(load_folder(folder).val)
    torch.manual_seed(2)
    assert read_back(load_folder(folder).val) == one


def test_training_pictures_are_augmented_and_all_others_are_not(folder):
    for path in folder.rglob("*.*"):
        dark_on_the_left().save(path)
    loaded = load_folder(folder)
    distinct = {
        split: len({image.numpy().tobytes() for image, _ in getattr(loaded, split)})
        for split in ("plain", "val", "test")
    }
    # PNG and JPEG differ by rounding: two pictures at most
    assert max(distinct.values()) <= 2
    assert len({image.numpy().tobytes() for image, _ in loaded.train}) > 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_train_or_test_is_refused(folder, split):
    (folder / split).rename(folder / "other")
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{split}/"):
        load_folder(folder)


def test_a_folder_without_any_class_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "pets" / split).mkdir(parents=True)
    with pytest.raises(ValueError, match="train"):
        load_folder(tmp_path / "pets")


def test_a_folder_with_too_few_pictures_for_validation_is_refused(tmp_path):
    for split in ("train", "test"):
        for label in range(2):
            Picture(label, split, label).save(tmp_path / "pets" / split / f"{label}" / "a.png")
    with pytest.raises(ValueError, match="2.*5"):
        load_folder(tmp_path / "pets")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["14.jpg", "12.png"])
@pytest.mark.parametrize("break_it", ["truncated", "empty", "text"])
def test_a_broken_picture_is_named(folder, split, name, break_it):
    broken = folder / split / "cat" / name
    Image.effect_noise((64, 64), 50).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no picture"}[break_it]
    )
    with pytest.raises(OSError, match=re.escape(str(broken))):
        load_folder(folder)


def noisy(folder: Path, *shapes: tuple[int, int]) -> Path:
    """The folder's pictures replaced by noise of these heights and widths in turn, as PNG."""
    for i, path in enumerate(sorted(folder.rglob("*.*"))):
        height, width = shapes[i % len(shapes)]
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    return folder


def assert_same_bytes(split: Dataset, other: Dataset) -> None:
    for (picture, label), (expected, number) in zip(each(split), each(other), strict=True):
        assert torch.equal(picture, expected) and torch.equal(label, number)


@pytest.mark.parametrize("shapes", [[(32, 32)], [(20, 28)], [(40, 32)], [(50, 40), (10, 33)]])
def test_pictures_kept_in_memory_are_bit_for_bit_those_decoded_when_asked(
    shapes, folder, monkeypatch
):
    kept = load_folder(noisy(folder, *shapes))
    monkeypatch.setattr(sets, "MOST_KEPT", 0)
    single = load_folder(folder)
    assert not any(isinstance(split, batches.Resident) for split in single[:4])
    for name in ("plain", "val", "test"):
        split = getattr(kept, name)
        assert isinstance(split, batches.Resident) and split.pictures.shape[2:] == (32, 32)
        assert_same_bytes(split, getattr(single, name))
    assert_same_bytes(sets.unaugmented(kept).train, single.plain)
    assert_same_bytes(sets.whole(kept).train, sets.whole(single).train)


def test_training_pictures_that_are_small_and_alike_are_augmented_in_batches(folder):
    train, plain = load_folder(noisy(folder, (32, 32)))[:2]
    assert train.pictures is plain.pictures and plain.augment is None
    train, plain = load_folder(noisy(folder, (20, 28)))[:2]
    assert train.pictures.shape == (16, 3, 20, 28) and train[[0, 1]][0].shape == (2, 3, 32, 32)
    assert train.augment == "crop+flip" and torch.equal(train.labels, plain.labels)
    resize = sets.transforms(32)[1]
    for picture, expected in zip(train.pictures, plain.pictures, strict=True):
        assert torch.equal(resize(v2.functional.to_pil_image(picture)), expected)


@pytest.mark.parametrize("shapes", [[(40, 32)], [(32, 33)], [(20, 20), (20, 21)]])
def test_training_pictures_that_are_large_or_unlike_are_decoded_when_asked(shapes, folder):
    loaded = load_folder(noisy(folder, *shapes))
    assert isinstance(loaded.train, sets.Single)
    assert all(image.shape == (3, 32, 32) for image, _ in each(loaded.train))


def test_pictures_alike_but_turned_by_their_exif_tag_are_decoded_when_asked(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = sorted(noisy(folder, (20, 28)).rglob("train/*/*.png"))
    for one in path[::2]:
        with Image.open(one) as image:
            image.save(one, exif=exif)
    loaded = load_folder(folder)
    assert isinstance(loaded.train, sets.Single) and isinstance(loaded.plain, batches.Resident)
    assert all(image.shape == (3, 32, 32) for image, _ in each(loaded.train))


def test_what_does_not_fit_in_memory_is_decoded_when_asked(folder, monkeypatch):
    monkeypatch.setattr(sets, "MOST_KEPT", 20 * 3 * 32 * 32)  # the labelled and the test pictures
    assert all(isinstance(split, batches.Resident) for split in load_folder(folder)[:4])
    monkeypatch.setattr(sets, "MOST_KEPT", 20 * 3 * 32 * 32 - 1)
    loaded = load_folder(folder)
    kept = [isinstance(split, batches.Resident) for split in loaded[:4]]
    assert kept == [True, False, False, True]
    assert len(sets.whole(loaded).train) == 20


def test_only_the_shots_are_decoded_and_they_are_those_of_the_whole_set(folder, monkeypatch):
    pictures = load_folder(noisy(folder, (40, 40)))
    expected = sets.take(pictures, 10)
    read, opened = [], sets.to_rgb
    monkeypatch.setattr("lab.folders.to_rgb", lambda image: read.append(1) or opened(image))
    loaded = load_folder(folder, shots=10)
    assert len(read) == 10 + len(loaded.test)
    for name in ("plain", "val", "test"):
        assert_same_bytes(getattr(loaded, name), getattr(expected, name))


def test_one_picture_in_memory_is_had_by_its_number():
    resident = in_memory(size=40)
    picture, label = resident[3]
    assert torch.equal(picture, resident[[3]][0][0]) and label.tolist() == [3, 4]


@pytest.mark.parametrize("pretrain, held_out", [(True, 1), (False, 10)])
def test_a_pretraining_holds_out_a_fiftieth_and_all_else_a_fifth(
    pretrain, held_out, folder, small_set
):
    flags = {"dataset": "pets", "data_dir": str(folder.parent), "task": "shape", "shots": None}
    flags |= {"protocol": None, "device": torch.device("cpu"), "pretrain": pretrain}
    for i in range(30):
        Picture(20, "train", 0).save(folder / "train" / "cat" / f"more{i}.png")
    loaded = sets.load_named(Namespace(**flags), 32)
    assert (len(loaded.train), len(loaded.val)) == (50 - held_out, held_out)
    small_set(write_cifar10, some_pictures(2, train=50, test=2))
    loaded = sets.load_named(Namespace(**flags | {"dataset": "cifar10"}), 32)
    assert (len(loaded.train), len(loaded.val)) == (50 - held_out, held_out)


def test_validation_pictures_are_the_first_of_the_shuffled_order(folder):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    listed = torchvision.datasets.ImageFolder(str(folder / "train"))
    for held_out, count in ((0.2, 4), (0.5, 10)):
        loaded = sets.from_folder(folder, 32, held_out=held_out)
        for split, numbers in ((loaded.val, order[:count]), (loaded.plain, order[count:])):
            expected = [v2.functional.pil_to_tensor(listed[i][0]) for i in numbers]
            assert torch.equal(split.pictures, torch.stack(expected))
            assert split.labels[:, 0].tolist() == [listed[i][1] for i in numbers]


# -------------------------------------------------------------------- VTAB-1k, FGVC and real tasks


def test_vtab_has_its_19_tasks_and_fgvc_its_five():
    groups = [group for group, _ in sets.VTAB.values()]
    assert [groups.count(g) for g in ("natural", "specialised", "structured")] == [7, 4, 8]
    assert groups == sorted(groups) and len(sets.FGVC) == 5
    for task, (_, reason) in (sets.VTAB | sets.FGVC | sets.REAL).items():
        assert (reason is None) == (task in sets.TORCHVISION)


def test_the_real_tasks_are_six_of_three_groups():
    assert {task: group for task, (group, _) in sets.REAL.items()} == {
        **dict.fromkeys(["cifar100", "cifar10", "caltech101"], "natural"),
        **dict.fromkeys(["aid", "bloodcells"], "specialised"),
        "gtsrb": "signs",
    }


@pytest.mark.parametrize("name, table", sets.SUITES.items())
def test_a_suite_is_what_torchvision_has_and_the_folders_that_are_there(name, table, tmp_path):
    tasks, left_out = sets.suite(name, str(tmp_path))
    assert tasks == [task for task in table if task in sets.TORCHVISION]
    assert {*tasks, *left_out} == {*table} and all(left_out.values())
    some = [*left_out][1]
    (tmp_path / some / "train").mkdir(parents=True)
    assert sets.suite(name, str(tmp_path)) == (tasks, left_out)  # half a folder is none
    (tmp_path / some / "test").mkdir()
    more, fewer = sets.suite(name, str(tmp_path))
    assert more == [task for task in table if task in (*tasks, some)]
    assert fewer == {task: reason for task, reason in left_out.items() if task != some}


@pytest.mark.parametrize(
    "task",
    ["resisc45", "stanford_dogs", "dtd", "dsprites_loc", "cifar10", "food101", "aid", "mine"],
)
def test_a_tasks_own_folder_is_read(task, folder):
    pictures = some_pictures(2, train=20, test=6)
    folder.rename(folder.parent / task)
    loaded = sets.load(task, data_dir=str(folder.parent), image_size=32)
    assert loaded.factors == [2]
    assert sorted(read_back(loaded.test)) == of(pictures, "test")
    assert sorted(read_back(loaded.val) + read_back(loaded.plain)) == of(pictures, "train")


def test_a_path_is_not_looked_for_below_the_data_folder(folder, monkeypatch):
    for place in (folder / "data", folder.parent / "elsewhere"):
        place.mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="no folder train/"):  # pets/data/.. would be a set
        sets.load("..", data_dir=str(folder / "data"), image_size=32)
    with pytest.raises(ValueError, match="neither a folder"):
        sets.load("data/../../pets", data_dir=str(folder), image_size=32)


@pytest.mark.parametrize(
    "task, varied",
    [("resisc45", True), ("cifar10", True), ("smallnorb_azi", False), ("svhn", False)],
)
def test_pictures_whose_place_or_direction_is_asked_for_are_not_augmented(task, varied, folder):
    for path in folder.rglob("*.*"):
        dark_on_the_left().save(path)
    folder.rename(folder.parent / task)
    train = sets.load(task, data_dir=str(folder.parent), image_size=32).train
    distinct = {image.numpy().tobytes() for image, _ in each(train)}
    assert (len(distinct) > 2) == varied  # PNG and JPEG differ by rounding


def test_a_task_that_is_nowhere_says_why_and_where_to_put_it(tmp_path):
    place = re.escape(str(tmp_path / "kitti_dist"))
    with pytest.raises(ValueError, match=f"kitti_dist.*videos.*{place}/train/") as caught:
        sets.load("kitti_dist", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", [True, False])
def test_the_last_training_is_on_all_labelled_pictures_as_they_are(memory, folder, small_set):
    pictures = some_pictures(2, train=20, test=6)
    few = sets.take(small_set(write_cifar10, pictures) if memory else load_folder(folder), 15)
    last = sets.whole(few)
    assert last.train is last.plain and len(last.train) == 15
    assert read_back(last.train) == read_back(few.plain) + read_back(few.val)
    assert not memory or isinstance(last.train, batches.Resident) and last.train.augment is None
    assert last.val is None and last[3:] == few[3:]


def test_without_augmentation_training_pictures_are_the_plain_ones(folder):
    loaded = load_folder(folder)
    plain = sets.unaugmented(loaded)
    assert plain.train is loaded.plain and plain[1:] == loaded[1:]


def test_smoothing_spreads_a_share_of_the_label_over_all_classes():
    outputs, labels = torch.randn(6, 5), torch.tensor([[0, 1], [2, 0], [1, 1]] * 2)
    wanted = torch.zeros(())
    for part, own in ((outputs[:, :3], labels[:, 0]), (outputs[:, 3:], labels[:, 1])):
        log = part.log_softmax(1)
        right = log[torch.arange(6), own]
        wanted = wanted - (0.9 * right + 0.1 * log.mean(1)).mean()
    torch.testing.assert_close(batches.factor_loss(outputs, labels, [3, 2], 0.1), wanted)
