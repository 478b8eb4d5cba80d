"""How a language model's answer to a question is read, and what guessing would get.

The answer is the likeliest option, or the first option that the model's own text names.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from lab.questions import Question, Tokenizer

ANSWER_TOKENS = 32  # what a model may say, as in LLM-Adapters' code
ABSENT = -1e9  # the score of an option that a question does not have


def accuracy(scores: Tensor, questions: list[Question]) -> float:
    """Share of right answers, 0 … 1; a tie, as between options none of which is named, is wrong."""
    best = scores.max(1)
    alone = (scores == best.values[:, None]).sum(1) == 1
    right = torch.tensor([question.answer for question in questions])
    return ((best.indices == right) & alone).float().mean().item()


def answer(
    model: nn.Module,
    questions: list[Question],
    tokenizer: Tokenizer,
    args,
) -> Tensor:
    """A score for every option, questions×(most options); the largest is the model's answer.

    With --score generate the named option has 1, the others 0, and all have 0 if none is named.
    """
    model.eval()
    scores = torch.full((len(questions), max(len(q.options) for q in questions)), ABSENT)
    bar = tqdm(total=len(questions), desc="scoring", unit=" questions", leave=False)
    if args.score == "generate":
        for row, question in enumerate(questions):
            scores[row, : len(question.options)] = 0
            named = first_named(speak(model, tokenizer, question), question.options)
            if named >= 0:
                scores[row, named] = 1
            bar.update()
        bar.close()
        return scores
    branches = [branch(question, tokenizer) for question in questions]
    by_length = sorted(range(len(branches)), key=lambda i: len(branches[i].shared))
    for i in range(0, len(branches), 2 * args.batch_size):  # equal lengths together: less padding
        some = by_length[i : i + 2 * args.batch_size]
        values = likelihoods(model, [branches[j] for j in some], args.device).cpu()
        scores[some, : values.shape[1]] = values
        bar.update(len(some))
    bar.close()
    return scores


class Branch(NamedTuple):
    """A question with its options: the tokens all options share, and how each goes on."""

    shared: list[int]
    tails: list[list[int]]


@functools.cache  # the same questions are scored after every epoch
def branch(question: Question, tokenizer: Tokenizer) -> Branch:
    stem = question.prompt + question.output.removesuffix(question.options[question.answer])
    texts = [stem + option for option in question.options]
    tokens = [tokenizer.encode(text) for text in texts]
    shared = os.path.commonprefix(tokens)
    tails = [t[len(shared) :] for t in tokens]
    if not all(tails):  # an option that begins another one: only where it ends tells them apart
        tails = [[*tail, tokenizer.end] for tail in tails]
    return Branch(shared, tails)


@torch.no_grad()
def likelihoods(model: nn.Module, branches: list[Branch], device: torch.device) -> Tensor:
    """log p(option | prompt) up to what all options of a question share, B×(most options).

    A question is one row: the shared tokens once, then every tail at the place it would have alone,
    with a mask that hides the tails from each other. A tail's last token is only predicted, so
    that tails of one token need neither places nor a mask.
    """
    rows, owners, places, asked = [], [], [], []
    for row, (shared, tails) in enumerate(branches):
        tokens, owner, place = [*shared], [0] * len(shared), [*range(len(shared))]
        for option, tail in enumerate(tails):
            for i, token in enumerate(tail):
                before = len(shared) - 1 if i == 0 else len(tokens) - 1
                asked.append((row, before, token, option))
                if i < len(tail) - 1:
                    tokens.append(token)
                    owner.append(option + 1)
                    place.append(len(shared) + i)
        rows.append(tokens), owners.append(owner), places.append(place)
    tokens, owner, place = (padded(lists, device) for lists in (rows, owners, places))
    mask = None
    if owner.any():
        own = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
        mask = own.tril()[:, None]  # B×1×N×N
    row, before, token, option = torch.tensor(asked, device=device).T
    logits = model.head(model.features(tokens, place, mask)[row, before]).float()
    picked = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    options = max(len(tails) for _, tails in branches)
    sums = picked.new_zeros(len(branches), options)
    sums.index_put_((row, option), picked, accumulate=True)
    counts = torch.tensor([len(tails) for _, tails in branches], device=device)
    absent = torch.arange(options, device=device) >= counts[:, None]
    return sums.masked_fill(absent, ABSENT)


def padded(lists: list[list[int]], device: torch.device) -> Tensor:
    """Rows of numbers as one B×(longest) tensor, filled up with zeros."""
    longest = max(map(len, lists))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in lists], device=device)


def first_named(text: str, options: Iterable[str]) -> int:
    """Which option a text names first, as LLM-Adapters' code reads it; −1 if it names none."""
    found = []
    for i, option in enumerate(options):
        if match := re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text):
            found.append((match.start(), -len(option), i))  # of two in one place, the longer
    return min(found)[2] if found else -1


def speak(model: nn.Module, tokenizer: Tokenizer, question: Question) -> str:
    """The model's own answer, the likeliest token each time."""
    prompt = tokenizer.encode(question.prompt)
    return tokenizer.decode(models.generate(model, prompt, ANSWER_TOKENS, tokenizer.end)).strip()


# --------------------------------------------------------------------------- what a guess would get


def guesses(train: list[Question], asked: list[Question]) -> dict[str, float]:
    """Accuracies, 0 … 1, without any understanding, measured on `asked`.

    chance: any option; constant: the option that was right most often in training, whatever is
    asked; position: the best place of all, chosen on `asked` itself; overlap: the option that
    shares the most words with the question. A tie is worth its share.
    """
    named = Counter(q.options[q.answer] for q in train)

    def share(question: Question, scores: list[float]) -> float:
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        return (question.answer in best) / len(best)

    places = range(max(len(q.options) for q in asked))
    return {
        "chance": mean(1 / len(q.options) for q in asked),
        "constant": mean(share(q, [named[option] for option in q.options]) for q in asked),
        "position": max(mean(q.answer == place for q in asked) for place in places),
        "overlap": mean(share(q, overlap_scores(q)) for q in asked),
    }


def overlap_scores(question: Question) -> list[float]:
    """How many of an option's words stand in the question; of true/false, how much is repeated."""
    text = question.prompt.split("### Instruction:")[-1].split("Answer format:")[0]
    if question.options == ("true", "false"):  # is what is asked said before?
        *before, last = re.split(r"[.:] ", text.strip())
        seen, asked = words(" ".join(before)), words(last)
        share = len(seen & asked) / max(1, len(asked))
        return [share, 1 - share]
    marks = [re.search(rf"{re.escape(o)}:", text, re.IGNORECASE) for o in question.options]
    if None in marks:  # the options are words themselves, not the names of texts
        return [float(len(words(text) & words(option))) for option in question.options]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = [text[mark.end() : end] for mark, end in zip(marks, ends)]
    return [float(len(words(text[: marks[0].start()]) & words(part))) for part in parts]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
