"""The data sets, read for training: pictures first, then language.

Pictures are sprites, torchvision's sets and folders. Each comes back as `Data`: three splits of
(picture, label) pairs, a picture being 3×H×W bytes and a label one whole number a factor (most
sets have one factor, the class). `to_input` turns a batch of bytes into what a model reads.
Language is microworld and the paper's eight commonsense tasks. Each comes back as `Questions`,
every one with its options; a tokenizer turns text into numbers.
[us] our choice, as in san.py.
"""

import http.client
import json
import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import microworld
import models
import san
import sprites


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
        data = from_sprites(task, source_size)
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
    train, val, test = (TensorDataset(*pair) for pair in drawn)
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


# ------------------------------------------------------------------------------ language: tokens

# The prompt of LLM-Adapters (Hu et al. 2023), which the paper's language experiments use: its
# words, without the indentation that its code puts before every line [us].
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


class Tokenizer:
    """Text ↔ numbers, with a small vocabulary of our own [us]; `saved` is what it is made from.

    0 … 255 are bytes, 256 ends a text, and from 257 on every number is one of `pieces`: words with
    the space before them, digits, signs, and the fixed sentences of the prompt. What is no piece
    is spelled in bytes, so that every text can be written and comes back the same.
    """

    end = 256
    WORD = r" ?[A-Za-z]+|\d|\s|[^\w\s]|\w"

    def __init__(self, pieces: list[str]):
        self.pieces = self.saved = list(pieces)
        self.number = {piece: 257 + i for i, piece in enumerate(pieces)}
        sentences = [piece for piece in pieces if not re.fullmatch(self.WORD, piece)]
        escaped = [re.escape(piece) for piece in sorted(sentences, key=len, reverse=True)]
        self.pattern = re.compile("|".join([*escaped, self.WORD]))

    def __len__(self) -> int:
        return 257 + len(self.pieces)

    def encode(self, text: str) -> list[int]:
        numbers = []
        for piece in self.pattern.findall(text):
            numbers += [self.number[piece]] if piece in self.number else piece.encode()
        return numbers

    def decode(self, numbers: list[int]) -> str:
        """The text of `encode`'s numbers; an end is left out."""
        known = [n for n in numbers if n != self.end]
        parts = [bytes([n]) if n < 256 else self.pieces[n - 257].encode() for n in known]
        return b"".join(parts).decode(errors="replace")


def microworld_tokenizer() -> Tokenizer:
    """Its pieces are the words of the microworld, met in its documents and questions."""
    texts = microworld.corpus(10_000)
    for family in microworld.FAMILIES:
        texts += [r["instruction"] for r in microworld.questions(family, "train", 200)]
    sentences = [*PROMPT.split("{}"), *microworld.HEADS.values(), microworld.FORM]
    sentences.append(microworld.OUTPUT)
    pieces = {piece for text in texts for piece in re.findall(Tokenizer.WORD, text)}
    pieces |= {*microworld.PEOPLE, *sentences}  # a name without a space begins some documents
    return Tokenizer(sorted(pieces))


class LlamaTokenizer:
    """A checkpoint's own tokenizer.json, read by the `tokenizers` package; `end` as in config.json.

    Raises OSError if the file is missing or broken, ValueError if the package is.
    """

    def __init__(self, folder: Path):
        self.saved, path = str(folder.resolve()), folder / "tokenizer.json"
        if not path.is_file():
            raise OSError(
                f"{folder} has no tokenizer.json; fetch it from where the weights are from"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                "a checkpoint's tokenizer needs packages: pip install -r requirements-extra.txt"
            ) from error
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exceptions
            raise OSError(f"{path} is no tokenizer that can be read ({error})") from error
        end = models.read_json(folder / "config.json").get("eos_token_id")
        self.end = next(iter(end), None) if isinstance(end, list) else end
        if type(self.end) is not int or not 0 <= self.end < len(self):
            raise OSError(f"{folder / 'config.json'} has no eos_token_id that {path.name} knows")

    def __len__(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, numbers: list[int]) -> str:
        return self.inner.decode(numbers)


# ------------------------------------------------------------------------- language: eight tasks

EIGHT = microworld.FAMILIES  # the folders' names are the tasks' names in LLM-Adapters
LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"


class Question(NamedTuple):
    """A prompt, the text to learn after it, the options and which of them is right.

    The text ends with the right option.
    """

    prompt: str
    output: str
    options: tuple[str, ...]
    answer: int


class Questions(NamedTuple):
    """The questions of each split by task."""

    train: dict[str, list[Question]]
    val: dict[str, list[Question]]
    test: dict[str, list[Question]]


def load_questions(
    source: str, tasks: list[str], train_file: str | None = None, shots: int | None = None
) -> Questions:
    """Questions of 'microworld' or of a folder with <task>/train.json and <task>/test.json.

    A task's validation questions are a fifth of its training questions, at most 200, in the way
    of VTAB-1k; microworld has its own, about other things. shots: how many labelled questions a
    task has in all, those for validation among them. train_file: one file with the training
    questions of all tasks (the paper's commonsense_170k.json) in place of every train.json. Which
    questions those are does not depend on a run's seed.

    Raises ValueError for an unknown or empty task or too many shots, OSError for a file that is
    missing and cannot be downloaded, or broken.
    """
    folder = Path(source)
    if source != "microworld" and not folder.is_dir():
        raise ValueError(f"--data {source} is neither a folder nor 'microworld'")
    unknown = [task for task in tasks if task not in EIGHT and not (folder / task).is_dir()]
    if unknown:
        raise ValueError(f"task '{unknown[0]}' is unknown; choose from {', '.join(EIGHT)}")
    if train_file is not None and source == "microworld":
        raise ValueError("--train-file goes with --data DIR, not with microworld")
    train, val, test = {}, {}, {}
    for task in tasks:
        own = held = None
        if source == "microworld":
            made = [microworld.questions(task, s, n) for s, n in microworld.COUNTS.items()]
            own, held, test[task] = (
                [question(record, f"microworld, {task}") for record in records] for records in made
            )
        else:
            files = {
                split: (folder / task / name, f"dataset/{task}/{name}" if task in EIGHT else None)
                for split, name in (("train", "train.json"), ("test", "test.json"))
            }
            test[task] = read_questions(*files["test"])
            if train_file is None:
                own = read_questions(*files["train"])
        if own is not None:
            val[task], train[task] = hold_out(own, held, shots, task)
    if train_file is not None:
        path = Path(train_file)
        joint = path.name == "commonsense_170k.json"
        own = read_questions(path, f"ft-training_set/{path.name}" if joint else None)
        val[path.stem], train[path.stem] = hold_out(own, None, shots, train_file)
    return Questions(train, val, test)


def hold_out(
    own: list[Question], held: list[Question] | None, shots: int | None, task: str
) -> tuple[list[Question], list[Question]]:
    """(validation, training) questions: a fifth and the rest, of `shots` or of all."""
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).tolist()
    own = [own[i] for i in order]
    if shots is None:
        val = len(held) if held else min(200, len(own) // 5)
        train = len(own) - (0 if held else val)
    else:
        val = min(200, shots // 5)
        train = shots - val
    held = held or own[train : train + val]
    if min(train, val) < 1 or train > len(own) or len(held) < val:
        raise ValueError(
            f"{task} has {len(own)} training questions, too few for {train} to train on and "
            f"{val} to validate with; at least 5 are needed, and as many as --shots asks for"
        )
    return held[:val], own[:train]


def read_questions(path: Path, address: str | None = None) -> list[Question]:
    """A file of LLM-Adapters' format; from its repository if it is missing here. Raises OSError."""
    if not path.is_file() and address is None:
        raise OSError(f"there is no file {path}")
    if not path.is_file():
        try:
            with urllib.request.urlopen(f"{LLM_ADAPTERS}/{address}", timeout=30) as answer:
                text = answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise OSError(
                f"there is no {path}, and it could not be downloaded ({error}); where there is no "
                f"network, fetch {LLM_ADAPTERS}/{address} and put it there"
            ) from error
        san.write(text, path, save=lambda content, file: file.write_bytes(content))
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise OSError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(records, list):
        raise OSError(f"{path} is not a list of questions")
    if not records:
        raise OSError(f"{path} holds no question")
    return [question(record, f"{path}, example {i}") for i, record in enumerate(records)]


def question(record: dict, where: str) -> Question:
    """One record of LLM-Adapters' format; its own "Answer format" line names the options.

    where: how to call the record in a message. Raises OSError for one that is not whole.
    """
    keys = ("instruction", "output", "answer")
    missing = [
        k for k in keys if not isinstance(record, dict) or not isinstance(record.get(k), str)
    ]
    if missing:
        raise OSError(f"{where} has no text called '{missing[0]}'")
    instruction, output, answer = (record[key].strip() for key in keys)
    if record.get("input"):
        instruction += f"\n\n{record['input']}"
    form = re.search(r"Answer format:(.+)$", record["instruction"].strip())
    if not form:
        raise OSError(
            f"{where} does not end with an 'Answer format: …' line that names its options"
        )
    options = tuple(option.strip() for option in form[1].split("/"))
    if len(set(options)) < max(2, len(options)) or "" in options:
        raise OSError(f"{where} needs two options or more, all different, not '{form[1].strip()}'")
    if answer not in options:
        raise OSError(f"{where} has the answer '{answer}', which is not among {', '.join(options)}")
    if not output.endswith(answer):
        raise OSError(f"{where} has an output that does not end with its answer '{answer}'")
    return Question(PROMPT.format(instruction), output, options, options.index(answer))
