"""Pictures on their way into a model: kept in memory, cropped, batched, and what comes out scored.

What is small stays in memory and comes a batch at a time (`Resident`); the rest is decoded when it
is asked for. `to_input` turns a batch of bytes into what a model reads. [us] our choice.
"""

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from tqdm import tqdm

from lab import checkpoints, ranks


def to_input(images: Tensor) -> Tensor:
    """Bytes B×3×H×W → numbers scaled by ImageNet's mean and deviation, as the weights expect."""
    mean, std = scale(images.device)
    return (images.float() / 255 - mean) / std


@functools.cache  # the host waits for a GPU that makes them
def scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and deviation, each 3×1×1, on the device."""
    numbers = torch.tensor([checkpoints.MEAN, checkpoints.STD], device=device)
    return tuple(numbers.view(2, 3, 1, 1))


@dataclass(eq=False)
class Resident(Dataset):
    """Pictures kept as bytes, N×3×H×W, with labels, N×factors; a whole batch is made at once.

    size: how many pixels a side is to have; where that is H and W, and nothing is augmented,
    a batch is the stored bytes. augment: None, "crop" (`crops`) or "crop+flip".
    A batch is made on the device that holds the pictures; what it is made of is drawn on the CPU,
    so that every machine draws the same, and a GPU never makes the host wait.
    For DataLoader(resident, sampler=BatchSampler(…), batch_size=None), since [] takes a list; of a
    number it gives one picture and its label, as any other set.
    """

    pictures: Tensor
    labels: Tensor
    size: int
    augment: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int] | int) -> tuple[Tensor, Tensor]:
        """Bytes B×3×size×size and labels B×factors."""
        if isinstance(indices, int):
            return tuple(batch[0] for batch in self[[indices]])
        device = self.pictures.device
        index = send(torch.tensor(indices), device)
        pictures, labels = self.pictures[index], self.labels[index]
        if self.augment:
            boxes = crops(len(indices))
            flips = torch.rand(len(indices)) < (0.5 if "flip" in self.augment else 0)
            pictures = cut_out(pictures, send(view(boxes, flips), device), self.size)
        elif pictures.shape[2:] != (self.size, self.size):
            pictures = resize(pictures, self.size)
        return pictures, labels

    def __add__(self, other: "Resident") -> "Resident":
        pairs = (self.pictures, other.pictures), (self.labels, other.labels)
        return self.having(*map(torch.cat, pairs))

    def having(self, pictures: Tensor, labels: Tensor) -> "Resident":
        """Other pictures, treated as these are."""
        return replace(self, pictures=pictures, labels=labels)

    def to(self, device: torch.device) -> "Resident":
        return self.having(self.pictures.to(device), self.labels.to(device))


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """From the CPU to the device; a GPU fetches pinned memory while the host goes on."""
    pinned = numbers.pin_memory() if device.type == "cuda" else numbers
    return pinned.to(device, non_blocking=True)


def crops(count: int) -> Tensor:
    """Boxes drawn at random, count×4: left, top, width and height in shares of a picture.

    Area 0.7 to 1, width : height from 3 : 4 to 4 : 3, as in `transforms`. Where a box does not
    fit, torchvision draws both again; here the second is drawn from what fits the first [us].
    """
    area, aspect, left, top = torch.rand(4, count)
    area = 0.7 + 0.3 * area
    most = (-area.log()).clamp(max=math.log(4 / 3))  # more, and a side would be longer than 1
    aspect = ((2 * aspect - 1) * most).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return torch.stack([left * (1 - width), top * (1 - height), width, height], dim=1)


def view(boxes: Tensor, flips: Tensor) -> Tensor:
    """Boxes n×4, and which of them are mirrored → n×2×3, affine_grid's maps onto the boxes."""
    left, top, width, height = boxes.T
    zero, way = torch.zeros_like(left), torch.where(flips, -1, 1)  # from −1 to 1, or back
    across = torch.stack([way * width, zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    return torch.stack([across, down], dim=1)


def cut_out(pictures: Tensor, views: Tensor, size: int) -> Tensor:
    """What each view shows of its picture, B×3×size×size bytes, between pixels bilinearly.

    It is for pictures that grow: of a larger one, grid_sample would leave pixels out unseen.
    """
    grid = F.affine_grid(views, [len(pictures), 3, size, size], align_corners=False)
    seen = F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)
    return seen.round().byte()


def resize(pictures: Tensor, size: int) -> Tensor:
    """Bytes B×3×H×W → B×3×size×size, as v2.Resize would."""
    resized = F.interpolate(pictures.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().byte()


# -------------------------------------------------------------------- batches, the loss, accuracies


def loader(pictures: Dataset, args: Namespace, shuffle: bool = False) -> DataLoader:
    """Batches, of what is `Resident` on its device already; larger where nothing is trained.

    To train on, a rank's rows of every batch, which are drawn as one process draws them; to score,
    the batches that are dealt to it.
    """
    if isinstance(pictures, Resident):
        if shuffle:
            sampler = BatchSampler(RandomSampler(pictures), args.batch_size, drop_last=False)
            return DataLoader(pictures, sampler=sampler, batch_size=None, collate_fn=ranks.cut)
        return DataLoader(pictures, sampler=in_order(pictures, args), batch_size=None)
    in_memory = isinstance(pictures, TensorDataset)
    loading = {
        "num_workers": 0 if in_memory else args.workers,
        "pin_memory": args.device.type == "cuda",
    }
    if not shuffle:
        return DataLoader(pictures, batch_sampler=in_order(pictures, args), **loading)
    rows = pictures if in_memory else Drawn(pictures)
    order = (RandomSampler if in_memory else Seeded)(rows)
    collate = functools.partial(ranks.collate, default_collate if in_memory else rows.read)
    return DataLoader(rows, args.batch_size, sampler=order, collate_fn=collate, **loading)


def in_order(pictures: Dataset, args: Namespace) -> list[list[int]]:
    """The batches to score that are dealt to this rank."""
    batches = BatchSampler(SequentialSampler(pictures), max(256, args.batch_size), drop_last=False)
    return [*ranks.dealt(batches)]


class Seeded(RandomSampler):
    """(index, seed) pairs in a random order; the seed is the epoch's."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seed = torch.initial_seed()
        return ((i, seed) for i in super().__iter__())


class Drawn(Dataset):
    """Pictures from files, each augmented by draws that its index and the epoch's seed decide.

    So neither the loader's processes nor the ranks change a run. They are read when a batch is put
    together, of which a rank takes its rows.
    """

    def __init__(self, pictures: Dataset):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int]:
        return place

    def read(self, places: list[tuple[int, int]]) -> list[Tensor]:
        rows = []
        with torch.random.fork_rng(devices=[]):
            for i, seed in places:
                torch.default_generator.manual_seed(1_000_003 * seed + i)
                rows.append(self.pictures[i])
        return default_collate(rows)


def prepare(inputs: Tensor, device: torch.device) -> Tensor:
    """Bytes become normalised pictures on the device; features only move there."""
    inputs = inputs.to(device, non_blocking=True)
    return to_input(inputs) if inputs.dtype == torch.uint8 else inputs


def factor_loss(
    outputs: Tensor, labels: Tensor, factors: list[int], smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy, summed over factors. outputs: B×Σclasses, labels: B×factors.

    smoothing: the share of a label that is spread over all classes.
    """
    parts = outputs.split(factors, dim=1)
    return sum(
        F.cross_entropy(part, labels[:, i], label_smoothing=smoothing)
        for i, part in enumerate(parts)
    )


def factor_accuracy(outputs: Tensor, labels: Tensor, factors: list[int]) -> list[float]:
    """Share of right answers, 0 … 1, for each factor."""
    parts = outputs.split(factors, dim=1)
    hits = [(part.argmax(1) == labels[:, i]) for i, part in enumerate(parts)]
    return [hit.float().mean().item() for hit in hits]


@torch.no_grad()
def outputs_of(
    function: Callable[[Tensor], Tensor], pictures: Dataset, args: Namespace, note: str = ""
) -> tuple[Tensor, Tensor]:
    """(function(picture), label) of a whole split, on the CPU; in float32, so that it repeats.

    Every rank computes the batches that are dealt to it, and has all of them.
    """
    results = []
    for inputs, labels in tqdm(loader(pictures, args), desc=note or "scoring", leave=False):
        results.append((function(prepare(inputs, args.device)).float(), labels))
    outputs, labels = zip(*ranks.collected([(o.cpu(), y.cpu()) for o, y in results]))
    return torch.cat(outputs), torch.cat(labels)
