"""Questions about pictures, for a LLaVA: scenes, easy-VQA, and folders in LLaVA's own JSON.

They come as `Questions` whose `pictures` gives bytes for the numbers that its questions hold. How
an answer is scored depends on the set (`gains`, `share`), and `guesses` is what one gets who does
not look:
    python -m lab.visual [scenes | easy-vqa --data-dir DIR]
[us] our choice, as in san.py.
"""

import argparse
import functools
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import models
import san
from lab import folders, ranks, scenes, tables
from lab.batches import to_input
from lab.questions import (
    IGNORE,
    Question,
    Questions,
    Tokenizer,
    collate,
    drawn,
    hold_out,
    is_text,
    read_records,
    token_loss,
)
from lab.scoring import chosen

IMAGE = "<image>"  # one place of a picture in a text; a prompt has all of them in a row
# as LLaVA-1.5 is asked, without the sentence that introduces the two [us]
PROMPT = "USER: {}{} ASSISTANT:"
DESCRIBE = "Describe the picture."
TEXTS = ("captions", "descriptions")  # of scenes, for pre-training
SPLITS = {"train": 40_000, "val": 500, "test": 1000}  # texts of each kind
PROJECTOR_RATE = 1e-3  # [us] of a LLaVA's projector, whatever the method
TOWER = Path(__file__).parent.parent / "weights" / "vit_micro.pt"
EASY = "easy-vqa"
EASY_TASKS = ("yes/no", "open")
EASY_WORDS = (  # what scenes lacks, as it stands in easy-VQA
    "does the image not contain a rectangle?",
    "is there a black gray brown teal shape present?",
    "what color shape is in the image? no triangle circle yes blue green red yellow",
)

# ------------------------------------------------------------------------------------------ flags


def add_flags(p: argparse.ArgumentParser) -> None:
    """train_lm.py's flags that are about pictures."""
    p.add_argument("--data-dir", help="where easy-VQA's files are")
    p.add_argument("--tower", action="store_true", help="adapt a LLaVA's vision tower as well")
    rate = f"of a LLaVA's projector; by default {PROJECTOR_RATE:g}"
    p.add_argument("--projector-lr", type=float, help=rate)
    p.add_argument("--blind", action="store_true", help="leave the pictures out of the text")


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what add_flags leaves open; a combination without a sense ends the program."""
    alone = args.method == "projector" and not args.compare
    seen = args.tower or alone or args.projector_lr is not None  # what needs pictures
    seeing = is_visual(args.data)
    if not seeing and (seen or args.blind):
        p.error("--tower, --blind and the projector go with data that have pictures")
    if args.data_dir and args.data != EASY and not args.evaluate:
        p.error(f"--data-dir goes with --data {EASY}")
    if args.tower and not args.compare and args.method in ("linear", "projector"):
        p.error(f"--tower changes nothing in --method {args.method}; leave it out")
    if args.blind and seen:
        p.error("--blind leaves the tower and the projector unread: leave it out to train them")
    if args.projector_lr is not None and (alone or not 0 < args.projector_lr < math.inf):
        p.error("--projector-lr must be a number above 0; with --method projector give --lr")
    if seeing and args.train_file:
        p.error("--train-file goes with --data DIR of questions in words alone")
    if seeing and not (alone or args.blind or args.evaluate):
        args.projector_lr = args.projector_lr or PROJECTOR_RATE


# ------------------------------------------------------------------------------ model, tokenizer


@functools.cache
def scenes_tokenizer() -> Tokenizer:
    """Its pieces are the words of scenes and of easy-VQA, and the fixed parts of the prompts."""
    texts = [DESCRIBE, *EASY_WORDS, *scenes.LETTERS]
    for long in (False, True):
        texts += scenes.captions(3000, 0, long)[1]
    for family in scenes.FAMILIES:
        for asked in scenes.questions(family, "train"):
            texts += [asked.text, *asked.options]
    # a text follows a line's end or a space
    texts = [start + text for text in texts for start in ("", " ")]
    words = {word for text in texts for word in re.findall(Tokenizer.WORD, text)}
    return Tokenizer(sorted(words | {IMAGE, "USER: ", "\n", " ASSISTANT:"}))


def untrained(tokenizer: Tokenizer) -> models.LLaVA:
    """llava_micro before its pre-training: sprites' vit_micro for a tower, all else random.

    LLaVA has a CLIP and a Vicuna there; we have neither, so that the language model must first
    read the texts alone, and the tower is trained with the rest in the end [us].
    """
    picture = tokenizer.number[IMAGE]
    model = models.LLaVA(vocab=len(tokenizer), picture=picture, **models.LLAVA_MICRO)
    state, own = san.read(TOWER)["state_dict"], model.tower.state_dict()
    model.tower.load_state_dict({name: state[name].float() for name in own})
    return model


def places(model: models.LLaMA) -> int:
    """How many places a picture takes in a text. Raises ValueError for a model without pictures."""
    if not isinstance(model, models.LLaVA):
        raise ValueError(
            "the data have pictures, and the model reads none: --weights needs a LLaVA"
        )
    return model.places


def require_token(model: models.LLaMA, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer does not write a picture's place as the model reads it."""
    places(model)
    if tokenizer.encode(IMAGE * 2)[-2:] != [model.picture] * 2:
        raise ValueError(
            f"the tokenizer of --weights has no token {IMAGE} with the number {model.picture}"
        )


# ------------------------------------------------------------------------------------------ data


class Files:
    """Pictures in files, of one size, read when asked for; the last 256 MB of them are kept.

    The headers are read at once. Raises OSError that names the file, then or later.
    """

    def __init__(self, paths: Iterable[Path], size: int):
        self.files, self.size = folders.Files([(path, 0) for path in paths]), size
        self.read = functools.lru_cache(max(1, 2**28 // (3 * size**2)))(self.read)

    def read(self, i: int) -> Tensor:
        """Bytes 3×size×size, squeezed or stretched [us]."""
        image = self.files[i][0].resize((self.size, self.size), Image.BICUBIC)
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(self.size, self.size, 3).permute(2, 0, 1)

    def __getitem__(self, numbers: list[int]) -> Tensor:
        return torch.stack([self.read(i) for i in numbers])


def is_visual(data: str) -> bool:
    """Whether --data has pictures: in a folder one of the two files tells, the other may lack."""
    own = (Path(data) / f"{split}.json" for split in ("train", "test"))
    return data in ("scenes", EASY) or any(path.is_file() for path in own)


def tasks_of(data: str) -> tuple[str, ...]:
    """The tasks that --data has by default."""
    return {"scenes": scenes.FAMILIES, EASY: EASY_TASKS}.get(data, (Path(data).resolve().name,))


def has_texts(asked: Questions) -> bool:
    """Whether there are texts, to be learned word by word, without options to choose from."""
    return any(len(q.options) == 1 for own in asked.test.values() for q in own)


def load(args: argparse.Namespace, model: models.LLaMA) -> Questions:
    """The questions of args.data, with their pictures. Raises ValueError or OSError."""
    count = 0 if args.blind else places(model)
    size = model.tower.image_size if count else 1
    if args.data == "scenes":
        if count and size != scenes.PIXELS:
            raise ValueError(
                f"scenes are drawn in {scenes.PIXELS} pixels, and the tower of --weights reads "
                f"{size}; take pictures in files, which are read in any size"
            )
        return load_scenes(args, count)
    if args.data == EASY:
        return load_easy(args, count, size)
    if [*args.tasks] != [*tasks_of(args.data)]:
        raise ValueError(f"--data {args.data} is one task; leave --tasks out")
    return load_folder(Path(args.data), count, size, args.shots, args.test_shots)


def asked_with(text: str, count: int) -> str:
    """A prompt with a picture of `count` places, or with none."""
    return PROMPT.format(IMAGE * count + "\n" if count else "", text)


def load_scenes(args: argparse.Namespace, count: int) -> Questions:
    known = (*scenes.FAMILIES, *TEXTS)
    if unknown := [task for task in args.tasks if task not in known]:
        raise ValueError(f"task '{unknown[0]}' is unknown; choose from {', '.join(known)}")
    if 0 < len({*args.tasks} & {*TEXTS}) < len(args.tasks):
        raise ValueError(f"{' and '.join(TEXTS)} are learned word by word, without other --tasks")
    splits: dict[str, dict] = {"train": {}, "val": {}, "test": {}}
    most = {"train": None, "val": None, "test": args.test_shots}
    if args.shots:  # a fifth of them for validation, 200 at most, as with other questions
        val = min(scenes.COUNTS["val"], args.shots // 5)
        most |= {"train": args.shots - val, "val": val}
        if not val:
            raise ValueError(f"--shots {args.shots} are too few: at least 5 are needed")
        task, train = args.tasks[0], args.shots - val
        if train > (whole := counts_of(task)["train"]):
            raise ValueError(f"{task} has {whole} training questions, too few for {train}")
    pictures: list[Tensor] = []
    for task in args.tasks:
        for split, own in splits.items():
            drawings, own[task] = scenes_split(task, split, most[split], count)
            if count:  # a question's rotations share its picture
                changes = [a is not b for a, b in zip(drawings[1:], drawings)]
                numbers = torch.tensor([0, *changes]).cumsum(0) + sum(map(len, pictures))
                asked = zip(own[task], numbers.tolist())
                own[task] = [q._replace(picture=number) for q, number in asked]
                single = [drawings[0], *(d for d, new in zip(drawings[1:], changes) if new)]
                seed = 10 * known.index(task) + [*splits].index(split)
                pictures.append(scenes.draw(single, seed))
    return Questions(*splits.values(), torch.cat(pictures) if pictures else None)


def scenes_split(
    task: str, split: str, most: int | None, count: int
) -> tuple[list, list[Question]]:
    """The scenes of one task's split, `most` at most, and what is asked or said about each."""
    whole = counts_of(task)[split]
    most = min(most or whole, whole)
    if task not in TEXTS:
        asked = scenes.questions(task, split, most)
        return [one.scene for one in asked], [from_asked(one, count) for one in asked]
    long, seed = task == "descriptions", [*SPLITS].index(split)
    drawings, texts = scenes.captions(most, seed, long)
    prompt = asked_with(DESCRIBE, count) if long else IMAGE * count
    return drawings, [Question(prompt, " ", (text,), 0) for text in texts]


def counts_of(task: str) -> dict[str, int]:
    """How many questions or texts the splits of a task of scenes have."""
    return SPLITS if task in TEXTS else scenes.COUNTS


def from_asked(asked: scenes.Asked, count: int) -> Question:
    """Its worth is that of VQA's ten annotators, min(n / 3, 1), or 1 for the one answer."""
    said, enough = Counter(asked.answers), min(3, len(asked.answers))
    worth = tuple(min(said[option] / enough, 1.0) for option in asked.options)
    right = asked.options.index(said.most_common(1)[0][0])
    return Question(asked_with(asked.text, count), " ", asked.options, right, worth=worth)


def load_easy(args: argparse.Namespace, count: int, size: int) -> Questions:
    """easy-VQA (MIT): train/ and test/ with questions.json and images/, at or below --data-dir.

    Of the training pictures every twentieth is held out: 200 questions of a task at most are for
    validation. An open question's options are all answers to open questions.
    """
    root = Path(args.data_dir or "data")
    below = ("", "data", "easy_vqa/data", f"{EASY}/easy_vqa/data")
    roots = [root / folder for folder in below]
    root = next((r for r in roots if (r / "train" / "questions.json").is_file()), root)
    if unknown := [task for task in args.tasks if task not in EASY_TASKS]:
        raise ValueError(f"task '{unknown[0]}' is unknown; choose from {', '.join(EASY_TASKS)}")
    paths: dict[Path, int] = {}
    records: dict[str, list] = {}
    for split in ("train", "test"):
        path = root / split / "questions.json"
        if not path.is_file():
            raise OSError(f"there is no file {path}; give --data-dir a folder with easy-VQA's data")
        records[split] = [easy_record(r, where) for where, r in read_records(path).items()]
    train, val, test = {}, {}, {}
    for task in args.tasks:
        of_task = {
            split: [r for r in own if (r[1] in ("yes", "no")) == (task == "yes/no")]
            for split, own in records.items()
        }
        options = tuple(sorted({answer for own in of_task.values() for _, answer, _ in own}))
        if len(options) < 2 or not all(of_task.values()):
            raise OSError(
                f"{root} has too few questions of the task '{task}': train/ and test/ need some, "
                "with two different answers or more"
            )

        def made(split: str, text: str, answer: str, number: int) -> Question:
            prompt, right = asked_with(text, count), options.index(answer)
            path, where = root / split / "images" / f"{number}.png", f"{split}/questions.json"
            picture = number_of(path, paths, where) if count else None
            return Question(prompt, " ", options, right, picture=picture)

        asked = [(made("train", *record), record[2]) for record in of_task["train"]]
        held = [question for question, number in asked if number % 20 == 0]
        rest = [question for question, number in asked if number % 20]
        val[task], train[task] = hold_out(rest, held[:200], args.shots, task)
        test[task] = drawn([made("test", *r) for r in of_task["test"]], args.test_shots)
    return Questions(train, val, test, Files(paths, size) if count else None)


def number_of(path: Path, paths: dict[Path, int], where: str) -> int:
    """A picture's number, a new one if it has none yet. Raises OSError if there is no file."""
    if path not in paths and not os.path.isfile(path):  # a name too long is no file either
        raise OSError(f"{where} names a picture, and there is no file {path}")
    return paths.setdefault(path, len(paths))


def easy_record(record: Any, where: str) -> tuple[str, str, int]:
    whole = isinstance(record, list) and [type(part) for part in record] == [str, str, int]
    if not (whole and all(map(is_text, record[:2]))):
        raise OSError(f"{where} is not a [question, answer, picture number] of easy-VQA")
    return tuple(record)


def load_folder(
    folder: Path, count: int, size: int, shots: int | None, test_shots: int | None
) -> Questions:
    """train.json and test.json in LLaVA's own JSON, pictures named from the folder on.

    Every answer of a conversation is an example, after all that was said before it [us]. So a
    conversation is for training or for validation as a whole, and shots and test_shots count them.
    """
    paths: dict[Path, int] = {}
    read = {}
    for split in ("train", "test"):
        path = folder / f"{split}.json"
        if not path.is_file():
            raise OSError(f"there is no file {path}; give a folder with train.json and test.json")
        read[split] = [
            conversation(record, where, folder, count, paths)
            for where, record in read_records(path).items()
        ]
        if not read[split]:
            raise OSError(f"{path} holds no conversation")
    val, train = hold_out(read["train"], None, shots, str(folder))
    if count and not paths:
        raise OSError(f"no record in {folder} has an 'image'; give --blind to read the texts alone")
    name, splits = folder.resolve().name, (train, val, drawn(read["test"], test_shots))
    asked = ({name: [q for said in split for q in said]} for split in splits)
    return Questions(*asked, Files(paths, size) if paths else None)


def conversation(
    record: Any, where: str, folder: Path, count: int, paths: dict[Path, int]
) -> list[Question]:
    """The answers of one record, each with what comes before it. Raises OSError that names it."""
    said = record.get("conversations") if isinstance(record, dict) else None
    turns = [t if isinstance(t, dict) else {} for t in said] if isinstance(said, list) else []
    kinds, values = [t.get("from") for t in turns], [t.get("value") for t in turns]
    if not turns or kinds != ["human", "gpt"] * (len(turns) // 2):
        raise OSError(f"{where} has no 'conversations' of human and gpt in turn")
    if not all(is_text(value) and value.strip() for value in values):
        raise OSError(f"{where} has a 'value' that is empty or no text")
    marks, number = [value.count(IMAGE) for value in values], None
    if sum(marks) != ("image" in record) or any(marks[1::2]):
        raise OSError(
            f"{where} has {sum(marks)} {IMAGE}, and what the human says needs one per 'image'"
        )
    if "image" in record and not is_text(record["image"]):
        raise OSError(f"{where} has an 'image' that is no file's name")
    if "image" in record and count:
        number = number_of(folder / record["image"], paths, where)
    found, before = [], ""
    for ask, answer in zip(values[::2], values[1::2]):
        text = ask.replace(IMAGE, "").strip()
        shown = IMAGE * count + "\n" if IMAGE in ask and count else ""
        before += PROMPT.format(shown, text)
        picture = number if IMAGE in before else None
        found.append(Question(before, " ", (answer.strip(),), 0, picture=picture))
        before += f" {answer.strip()} "
    return found


# ------------------------------------------------------------------------------------- batches


def collated(pictures: Any) -> Callable[[list[tuple]], tuple[Tensor, ...]]:
    """What makes a batch of (tokens, start, picture): as `collate`, and bytes B×3×H×W.

    A text without a picture has the first one there, which is never read. pictures: None for texts
    alone, whose batches are of two.
    """

    def collate_seen(batch: list[tuple]) -> tuple[Tensor, ...]:
        batch = sorted(batch, key=lambda one: len(one[0]))  # pictures in the order of the rows
        rows = collate([(tokens, start) for tokens, start, _ in batch])
        return rows if pictures is None else (*rows, pictures[[n or 0 for *_, n in batch]])

    return collate_seen


def images(model: nn.Module, tokens: Tensor, pictures: list[Tensor]) -> dict[str, Tensor]:
    """What `features` reads beside the tokens: the pictures of those rows that have places."""
    if not pictures:
        return {}
    rows = (tokens == model.picture).any(1)
    return {"images": to_input(pictures[0][rows])} if rows.any() else {}


def loss(model: nn.Module, batch: tuple, device: torch.device) -> Tensor:
    """`token_loss` of a batch of tokens and labels, and of pictures if it has them."""
    tokens, labels, *pictures = (x.to(device, non_blocking=True) for x in batch)
    return token_loss(model, tokens, labels, **images(model, tokens, pictures))


def shower(pictures: Any, device: torch.device) -> Callable[[list[Question]], dict[str, Tensor]]:
    """What gives the images of some questions, as `features` reads them."""

    def show(asked: list[Question]) -> dict[str, Tensor]:
        numbers = [q.picture for q in asked if q.picture is not None]
        return {"images": to_input(pictures[numbers].to(device))} if numbers else {}

    return show


@torch.no_grad()
def next_words(
    model: nn.Module, loader: Iterable[tuple], device: torch.device
) -> tuple[Tensor, dict]:
    """The first batch's logits at its labels; the share of right tokens, 0 … 1, and perplexity.

    Every rank reads the batches that are dealt to it; the logits are those of its own first, None
    if it has none.
    """
    model.eval()
    mine, first = [], None
    for batch in ranks.dealt(loader, model):
        tokens, labels, *pictures = (x.to(device) for x in batch)
        asked = labels != IGNORE
        features = model.features(tokens, **images(model, tokens, pictures))
        logits, right = model.head(features[asked]).float().cpu(), labels[asked].cpu()
        first = logits if first is None else first
        losses = F.cross_entropy(logits, right, reduction="none")
        mine.append(((logits.argmax(-1) == right).float(), losses))
    hits, losses = zip(*ranks.collected(mine, model))
    perplexity = torch.cat(losses).mean().exp().item()
    return first, {"test": torch.cat(hits).mean().item(), "perplexity": perplexity}


# ------------------------------------------------------------------------------------- scores


def gains(scores: Tensor, asked: list[Question]) -> Tensor:
    """What each question's likeliest option is worth, 0 … 1; a tie is worth nothing."""
    best = zip(asked, chosen(scores).tolist())
    return torch.tensor([0.0 if i < 0 else worth_of(q)[i] for q, i in best])


def worth_of(q: Question) -> tuple[float, ...]:
    return q.worth or tuple(float(i == q.answer) for i in range(len(q.options)))


def in_a_row(task: str, asked: list[Question]) -> int:
    """How many questions count as one: of scenes' MMBench a question's four rotations."""
    return 4 if task == "MMBench" and asked[0].worth else 1


def counted(task: str, scores: Tensor, asked: list[Question]) -> Tensor:
    """`gains` of what counts as one: of several questions what is worth least."""
    return gains(scores, asked).view(-1, in_a_row(task, asked)).amin(1)


def parts(task: str, scores: Tensor, asked: list[Question]) -> dict[str, float]:
    """A task's score, 0 … 1, the mean of what is `counted`.

    For scenes' POPE its F1 of "yes" and the accuracy of each sampling besides.
    """
    gained = counted(task, scores, asked)
    found = {task: gained.mean().item()}
    if task == "POPE" and asked[0].worth:
        said, true = (
            torch.tensor([i >= 0 and q.options[i] == "yes" for q, i in zip(asked, answers)])
            for answers in (chosen(scores).tolist(), [q.answer for q in asked])
        )
        found["POPE F1"] = (2 * (said & true).sum() / (said.sum() + true.sum()).clamp(1)).item()
        for i, name in enumerate(scenes.SAMPLINGS[: len(asked)]):
            found[f"POPE {name}"] = gained[i::3].mean().item()
    return found


def guesses(task: str, train: list[Question], asked: list[Question]) -> dict[str, float]:
    """Scores, 0 … 1, without looking, measured on `asked`.

    constant: the option that was worth most in training, whatever is asked. per question: the one
    that was for the same words. words: the most probable by naive Bayes, p(a) Π p(word | a).
    Each chooses among the question's own options.
    """
    worth, by_text = Counter(), defaultdict(Counter)
    words, size = defaultdict(Counter), len({w for q in train for w in plain(q.prompt).split()})
    for q in train:
        words[q.options[q.answer]].update(plain(q.prompt).split())
        for option, value in zip(q.options, worth_of(q)):
            worth[option] += value
            by_text[unlisted(q)][option] += value

    def bayes(q: Question, option: str) -> float:
        seen, total = words[option], words[option].total()
        start = math.log(worth[option] + 1)
        text = plain(q.prompt).split()
        return start + sum(math.log((seen[word] + 1) / (total + size)) for word in text)

    ways: dict[str, Callable[[Question, str], float]] = {
        "constant": lambda q, option: worth[option],
        "per question": lambda q, option: by_text[unlisted(q)][option] + 1e-6 * worth[option],
        "words": bayes,
    }
    found = {}
    for name, way in ways.items():
        scores = torch.full((len(asked), max(len(q.options) for q in asked)), -math.inf)
        for row, q in enumerate(asked):
            scores[row, : len(q.options)] = torch.tensor([way(q, option) for option in q.options])
        found[name] = counted(task, broken_ties(scores), asked).mean().item()
    return found


def broken_ties(scores: Tensor) -> Tensor:
    """1 for the first of the best options, 0 for the others."""
    return F.one_hot(scores.argmax(1), scores.shape[1]).float()


def plain(prompt: str) -> str:
    """What a prompt asks, without what every prompt has."""
    return re.sub(rf"(?:{IMAGE})+\n?|USER: | ASSISTANT:", "", prompt)


def heading(task: str, q: Question) -> str:
    """What a question asks, after the name of its picture's file if it has one."""
    text = plain(q.prompt.split("### Instruction:\n")[-1].split("\n\n### Response")[0])
    return text if q.picture is None else f"{picture_file(task)}: {text}"


def unlisted(q: Question) -> str:
    """What is asked, without the list of options."""
    return plain(q.prompt).removesuffix(" / ".join(q.options))


# ---------------------------------------------------------------------------------- what is shown


def picture_file(task: str) -> str:
    return f"{task.replace('/', '-')}.png"


def save_pictures(asked: dict[str, Question], pictures: Any, folder: Path) -> None:
    """Of each task's question the picture, as <folder>/<task>.png; small ones are enlarged."""
    for task, q in asked.items():
        if q.picture is None:
            continue
        data = pictures[[q.picture]][0]
        scale = max(1, 256 // data.shape[-1])
        data = data.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        path = folder / picture_file(task)
        image = Image.fromarray(data.permute(1, 2, 0).numpy())
        san.write(image, path, save=lambda content, file: content.save(file, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.visual", description=guesses.__doc__)
    parser.add_argument("data", nargs="?", default="scenes", choices=["scenes", EASY])
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    if args.data_dir and args.data != EASY:
        parser.error(f"--data-dir goes with {EASY}")
    args = argparse.Namespace(
        **vars(args), tasks=tasks_of(args.data), blind=True, shots=None, test_shots=None
    )
    try:
        asked = load(args, None)
    except (ValueError, OSError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"lab.visual: {error}\n")
    rows = []
    for task, own in asked.test.items():
        options = Counter(len(q.options) for q in own).most_common(1)[0][0]
        row = {"task": task, "questions": len(own), "options": options}
        found = guesses(task, asked.train[task], own)
        rows.append(row | {name: f"{100 * value:.1f}" for name, value in found.items()})
    print(tables.markdown(rows))


if __name__ == "__main__":
    main()
