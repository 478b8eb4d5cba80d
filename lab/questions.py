"""Questions in words, read for training: microworld's and the paper's eight commonsense tasks.

They come as `Questions`, every one with its options and the right one among them; a tokenizer
turns text into numbers. [us] our choice, as in san.py.
"""

import codecs
import http.client
import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import san
from lab import microworld
from lab.llama import LlamaTokenizer

# -------------------------------------------------------------------------------------- tokens

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


# --------------------------------------------------------------------------------- eight tasks

EIGHT = microworld.FAMILIES  # the folders' names are the tasks' names in LLM-Adapters
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE  # how such a text begins
LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"


class Question(NamedTuple):
    """A prompt, how the answer begins, the options, which of them is right, and how the text ends.

    The text of an option is prompt + lead + option + rest. `rest` is empty but where the options
    fill a blank. picture: the number of the picture that is asked about, if any. worth: what each
    option is worth, 0 … 1, where it is not 1 for the right one and 0 for others.
    """

    prompt: str
    lead: str
    options: tuple[str, ...]
    answer: int
    rest: str = ""
    picture: int | None = None
    worth: tuple[float, ...] = ()

    @property
    def output(self) -> str:
        """What follows the prompt where the right option is taken."""
        return self.lead + self.options[self.answer] + self.rest

    def scored(self, option: int) -> tuple[str, str]:
        """What is read of an option's text, and what is then scored.

        That is the option's own words, with the space before them, since most tokenizers join the
        two. Names that fill a blank are all followed by the rest of the sentence, which tells them
        apart better than how frequent each is: there the rest is scored.
        """
        read, words = self.prompt + self.lead, self.options[option]
        if self.rest:
            return read + words, self.rest
        before = read.rstrip(" ")
        return before, read[len(before) :] + words

    def learned(self) -> tuple[str, str]:
        """What is read in training, and what is then learned: of the right option what is scored.

        A lead is learned with the words that follow it.
        """
        return self.scored(self.answer) if self.rest else (self.prompt, self.output)


class Questions(NamedTuple):
    """The questions of each split by task; pictures[numbers] gives bytes, B×3×H×W, if any do."""

    train: dict[str, list[Question]]
    val: dict[str, list[Question]]
    test: dict[str, list[Question]]
    pictures: Any = None


def load_questions(
    source: str,
    tasks: list[str],
    train_file: str | None = None,
    shots: int | None = None,
    ask: str = "options",
    test_shots: int | None = None,
) -> Questions:
    """Questions of 'microworld' or of a folder with <task>/train.json and <task>/test.json.

    A task's validation questions are a fifth of its training questions, at most 200, in the way
    of VTAB-1k; microworld has its own, about other things. shots: how many labelled questions a
    task has in all, those for validation among them. train_file: one file with the training
    questions of all tasks (the paper's commonsense_170k.json) in place of every train.json.
    test_shots: how many test questions of a task are taken, where it has more. Which questions
    those are does not depend on a run's seed. ask: how files' questions are asked, as for
    `question`; microworld's list their options' own words, and are asked as they stand.

    Raises ValueError for an unknown or empty task or too many shots, OSError for a file that is
    missing and cannot be downloaded, or broken.
    """
    folder = Path(source)
    if source != "microworld" and not folder.is_dir():
        raise ValueError(
            f"--data {source} is neither a folder nor one of microworld, scenes and easy-vqa"
        )
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
            test[task] = read_questions(*files["test"], ask=ask)
            if train_file is None:
                own = read_questions(*files["train"], ask=ask)
        test[task] = drawn(test[task], test_shots)
        if own is not None:
            val[task], train[task] = hold_out(own, held, shots, task)
    if train_file is not None:
        path = Path(train_file)
        joint = path.name == "commonsense_170k.json"
        own = read_questions(path, f"ft-training_set/{path.name}" if joint else None, ask)
        val[path.stem], train[path.stem] = hold_out(own, None, shots, train_file)
    return Questions(train, val, test)


def hold_out(own: list, held: list | None, shots: int | None, task: str) -> tuple[list, list]:
    """(validation, training) questions or conversations: a fifth and the rest, of shots or all."""
    own = [own[i] for i in shuffled(len(own))]
    if shots is None:
        val = len(held) if held else min(200, len(own) // 5)
        train = len(own) - (0 if held else val)
    else:
        val = min(200, shots // 5)
        train = shots - val
    held = held or own[train : train + val]
    if min(train, val) < 1 or train > len(own) or len(held) < val:
        raise ValueError(
            f"{task} has {len(own)} training examples, too few for {train} to train on and "
            f"{val} to validate with; at least 5 are needed, and as many as --shots asks for"
        )
    return held[:val], own[:train]


def drawn(own: list, count: int | None) -> list:
    """`count` of them, in their order; all where there are no more, or count is None."""
    return [own[i] for i in sorted(shuffled(len(own))[:count])]


def shuffled(count: int) -> list[int]:
    """0 … count − 1 in an order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def read_questions(path: Path, address: str | None = None, ask: str = "options") -> list[Question]:
    """A file of LLM-Adapters' format; from its repository if it is missing here.

    One JSON list, or JSON Lines, an example per line; in UTF-8 or, with its mark, UTF-16. ask: as
    for `question`. Raises OSError, which names the line or the example.
    """
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
    records = read_records(path)
    if not records:
        raise OSError(f"{path} holds no question")
    return [question(record, where, ask) for where, record in records.items()]


def read_records(path: Path) -> dict[str, Any]:
    """The records of a JSON list or of JSON Lines, by what to call each in a message."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OSError(f"{path}, line {line}, is no text in UTF-8 or UTF-16") from error
    if text.lstrip().startswith("["):
        records = enumerate(parsed(text, path, 1))
        return {f"{path}, example {i}": record for i, record in records}
    lines = enumerate(text.split("\n"), 1)
    return {f"{path}, line {n}": parsed(line, path, n) for n, line in lines if line.strip()}


def parsed(text: str, path: Path, line: int) -> Any:
    """What a JSON text says, which begins in this line of a file. Raises OSError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OSError(
            f"{path}, line {line + error.lineno - 1}, is not JSON: {error.msg}, "
            f"character {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise OSError(f"{path}, line {line}, cannot be read: {error}") from error


def is_text(value: Any) -> bool:
    """Whether it is a text that can be written: one without halves of a letter."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def question(record: dict, where: str, ask: str = "options") -> Question:
    """One record of LLM-Adapters' format; its own "Answer format" line names the options.

    where: how to call the record in a message. ask: "options", with the instruction as it stands,
    as the paper has it; or `in_words`. Raises OSError for one that is not whole.
    """
    keys = ("instruction", "output", "answer")
    record = record if isinstance(record, dict) else {}
    for key in (*keys, "input") if record.get("input") else keys:
        text = record.get(key)
        if not is_text(text):
            raise OSError(f"{where} has no text called '{key}'")
    instruction, output, answer = (record[key].strip() for key in keys)
    more = f"\n\n{record['input']}" if record.get("input") else ""
    form = re.search(r"Answer format:(.+)$", instruction)
    if not form:
        raise OSError(
            f"{where} does not end with an 'Answer format: …' line that names its options"
        )
    options = tuple(option.strip() for option in form[1].split("/"))
    if len(set(options)) < max(2, len(options)) or "" in options:
        raise OSError(f"{where} needs two options or more, all different, not '{form[1].strip()}'")
    if answer not in options:
        raise OSError(f"{where} has the answer {answer!r}, which is not among {', '.join(options)}")
    if not output.endswith(answer):
        raise OSError(f"{where} has an output that does not end with its answer '{answer}'")
    if ask == "words":
        return in_words(instruction[: form.start()], more, options, options.index(answer), where)
    prompt, lead = PROMPT.format(instruction + more), output.removesuffix(answer)
    return Question(prompt, lead, options, options.index(answer))


def in_words(text: str, more: str, names: tuple[str, ...], answer: int, where: str) -> Question:
    """The same without its list of options, each of which is a way for the text to go on.

    text, more: the instruction up to its answer format, and what follows; names: the options. Those
    that are numbered, as answer1, stand for what "Answer1:" introduces.
    Asked as the language models' evaluation harness asks (Gao et al. 2021, lm-eval): HellaSwag's
    sentence is continued, WinoGrande's blank filled, all else is "Question: …\nAnswer:". As the
    files tell no task, OpenBookQA is asked as ARC is, where the harness leaves these two words out
    [us]. BoolQ's true and false are yes and no.
    Raises OSError if the text does not hold what the names stand for.
    """
    words = names
    if all(re.fullmatch(r"[A-Za-z]+\d+", name) for name in names):
        marks = "|".join(rf"\b{name}:" for name in names)
        found = re.findall(marks, text, re.IGNORECASE)
        if [mark.lower() for mark in found] != [f"{name}:".lower() for name in names]:
            wanted = " ".join(f"{name}: …" for name in names)
            raise OSError(f"{where} does not list its options as '{wanted}'")
        text, *words = (part.strip() for part in re.split(marks, text, flags=re.IGNORECASE))
    head = next((head for head in microworld.HEADS.values() if text.startswith(head)), "")
    text = text.removeprefix(head).strip() + more
    if head == microworld.HEADS["hellaswag"]:
        text, *words = (without_marks(part) for part in (text, *words))
    if "" in (text, *words):
        raise OSError(f"{where} has an empty question or option")
    if set(names) == {"true", "false"}:
        words = ["yes" if name == "true" else "no" for name in names]
    if head == microworld.HEADS["winogrande"]:
        if text.count("_") != 1:
            raise OSError(f"{where} needs one blank, '_', for its options to fill")
        before, rest = text.split("_")
        return Question(before.rstrip(), " " if before else "", (*words,), answer, rest)
    prompt = text if head == microworld.HEADS["hellaswag"] else f"Question: {text}\nAnswer:"
    return Question(prompt, " ", (*words,), answer)


def without_marks(text: str) -> str:
    """HellaSwag's text without [header], [title] and [step], as the harness has it."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return " ".join(text.split())


# ----------------------------------------------------------------------------- batches and the loss

IGNORE = -100  # the label of a token whose successor is not asked for


def encode(question: Question, tokenizer: Tokenizer | LlamaTokenizer) -> tuple[list[int], int]:
    """Tokens of what is read, what is learned and the end; and where what is learned begins.

    Both are written together, as a tokenizer may join what stands at the border.
    """
    read, learned = question.learned()
    tokens, start = joined(read, learned, tokenizer)
    return [*tokens, tokenizer.end], start


def joined(before: str, after: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Tokens of two texts in a row, and where those begin that `before` alone does not have.

    The first token is never one of them: nothing predicts it.
    """
    tokens = tokenizer.encode(before + after)
    return tokens, max(1, len(os.path.commonprefix([tokenizer.encode(before), tokens])))


def collate(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Encoded questions → tokens and labels, B×N, padded to the longest; the prompt has no label.

    A causal model never sees what stands to the right, so that padding needs no mask. The shortest
    come first: a batch that is read in parts then has little padding in most of them.
    """
    batch = sorted(batch, key=lambda pair: len(pair[0]))
    longest = len(batch[-1][0]) - 1
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE)
    for row, (tokens, start) in enumerate(batch):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return inputs, labels


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor, **shown: Tensor) -> Tensor:
    """Mean cross-entropy of the labels that are not IGNORE; the head reads those places alone.

    What stands to the right of all of them is left unread. shown: a LLaVA's `images`.
    """
    longest = (labels != IGNORE).any(0).nonzero().max() + 1
    tokens, labels = tokens[:, :longest], labels[:, :longest]
    asked = labels != IGNORE
    logits = model.head(model.features(tokens, **shown)[asked])
    return F.cross_entropy(logits.float(), labels[asked])
