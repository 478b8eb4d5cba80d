"""How a language model's answer to a question is read, and what guessing would get.

The answer is the likeliest option, or the first option that the model's own text names.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from lab import ranks
from lab.questions import Question, Tokenizer, joined

ANSWER_TOKENS = 32  # what a model may say, as in LLM-Adapters' code
ABSENT = -1e9  # the score of an option that a question does not have
TOKENS = 1024  # scored at once at most, with padding; a CPU gains nothing from more
PADDED = 1.2  # in a batch the longest is at most so many times as long as the shortest


def chosen(scores: Tensor) -> Tensor:
    """Each question's option with the largest score; −1 if several have it, as if none is named."""
    best = scores.max(1)
    tied = (scores == best.values[:, None]).sum(1) > 1
    return best.indices.masked_fill(tied, -1)


def accuracy(scores: Tensor, questions: list[Question]) -> float:
    """Share of right answers, 0 … 1; where several options are the likeliest, none is."""
    right = chosen(scores) == torch.tensor([question.answer for question in questions])
    return right.float().mean().item()


def per_character(scores: Tensor, questions: list[Question]) -> Tensor:
    """Log-likelihoods, questions×options, each over the length of its text, as acc_norm has them.

    A long option is else the less likely for its length alone. The length is that in characters,
    without the space before it: as in the evaluation harness (lm-eval), and the same for every
    tokenizer, which a number of tokens is not.
    """
    lengths = torch.ones_like(scores)
    for row, question in enumerate(questions):
        for option in range(len(question.options)):
            lengths[row, option] = len(question.scored(option)[1].strip())
    return scores / lengths


def answer(
    model: nn.Module,
    questions: list[Question],
    tokenizer: Tokenizer,
    args,
    show: Callable[[list[Question]], dict[str, Tensor]] = lambda asked: {},
) -> Tensor:
    """A score for every option, questions×(most options); the largest is the model's answer.

    show: what a LLaVA reads beside the tokens of some questions, their `images`.
    With --score generate the named option has 1, the others 0, and all have 0 if none is named.
    Every rank reads the batches that are dealt to it, and has all scores.
    """

    def named() -> Iterator[tuple[list[int], Tensor]]:
        prompts = [len(question.prompt) for question in questions]
        of_a_size = batched(prompts, lambda own: len(own) <= args.batch_size)
        for some in ranks.dealt(of_a_size, model):
            own = [questions[i] for i in some]
            said = speak_batch(model, tokenizer, own, **show(own))
            values = torch.full((len(own), scores.shape[1]), ABSENT)
            for row, text, question in zip(values, said, own):
                row[: len(question.options)] = 0
                if (first := first_named(text, question.options)) >= 0:
                    row[first] = 1
            yield some, values

    def likely() -> Iterator[tuple[list[int], Tensor]]:
        branches = [branch(question, tokenizer) for question in questions]
        fitting = batched([own.length for own in branches], fits_in_batch)
        for some in ranks.dealt(fitting, model):
            shown = show([questions[i] for i in some])
            yield some, likelihoods(model, [branches[i] for i in some], args.device, **shown)

    model.eval()
    read = named if args.score == "generate" else likely
    scores = torch.full((len(questions), max(len(q.options) for q in questions)), ABSENT)
    mine = []
    with tqdm(total=len(questions), desc="scoring", unit=" questions", leave=False) as bar:
        for some, values in read():
            mine.append((some, values.cpu()))
            bar.update(len(some) * (1 if ranks.is_sharded(model) else ranks.count()))
    for some, values in ranks.collected(mine, model):
        scores[some, : values.shape[1]] = values
    return scores


def batched(lengths: list[int], fits: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """0 … len(lengths) − 1 in batches, the shortest first, so that there is little padding.

    fits: whether a batch of these lengths, in order, is not too large; one alone never is.
    """
    some: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if some and not fits([lengths[j] for j in (*some, i)]):
            yield some
            some = []
        some.append(i)
    yield some


def fits_in_batch(lengths: list[int]) -> bool:
    return len(lengths) * lengths[-1] <= TOKENS and lengths[-1] <= PADDED * lengths[0]


class Branch(NamedTuple):
    """A question with its options: the tokens all options share, and how each goes on."""

    shared: list[int]
    tails: list[list[int]]
    starts: list[int]  # where in an option's tokens, shared and tail, those begin that are scored

    @property
    def length(self) -> int:
        """How many tokens are read; a tail's last one is only predicted."""
        return len(self.shared) + sum(max(0, len(tail) - 1) for tail in self.tails)


@functools.cache  # the same questions are scored after every epoch
def branch(question: Question, tokenizer: Tokenizer) -> Branch:
    texts = [question.scored(option) for option in range(len(question.options))]
    tokens, starts = zip(*(joined(*text, tokenizer) for text in texts))
    shared = os.path.commonprefix(tokens)
    return Branch(shared, [own[len(shared) :] for own in tokens], [*starts])


@torch.no_grad()
def likelihoods(
    model: nn.Module, branches: list[Branch], device: torch.device, **shown: Tensor
) -> Tensor:
    """log p(what is scored | what is read) of every option, B×(most options).

    A question is one row: the shared tokens once, then every tail at the place it would have alone,
    with a mask that hides the tails from each other. So every token is read once, as with a cache
    of the shared tokens' keys and values, and in one pass. A tail's last token is only predicted,
    so that tails of one token need neither places nor a mask.
    """
    rows, owners, places, asked = [], [], [], []
    for row, (shared, tails, starts) in enumerate(branches):
        tokens, owner, place = [*shared], [0] * len(shared), [*range(len(shared))]
        for option, (tail, start) in enumerate(zip(tails, starts)):
            at = [*range(len(shared)), *range(len(tokens), len(tokens) + len(tail) - 1)]
            text = [*shared, *tail]
            asked += [(row, at[i - 1], text[i], option) for i in range(start, len(text))]
            tokens += tail[:-1]
            owner += [option + 1] * len(tail[:-1])
            place += range(len(shared), len(text) - 1)
        rows.append(tokens), owners.append(owner), places.append(place)
    tokens, owner, place = (padded(lists, device) for lists in (rows, owners, places))
    mask = None
    if owner.any():
        own = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
        mask = own.tril()[:, None]  # B×1×N×N
    row, before, token, option = torch.tensor(asked, device=device).T
    # many tails begin at the same place: the head reads it once
    where, which = torch.unique(row * tokens.shape[1] + before, return_inverse=True)
    features = model.features(tokens, place, mask, **shown)
    logits = model.head(features.flatten(0, 1)[where]).float()
    picked = logits[which, token] - logits.logsumexp(-1)[which]
    options = max(len(tails) for _, tails, _ in branches)
    sums = picked.new_zeros(len(branches), options)
    sums.index_put_((row, option), picked, accumulate=True)
    counts = torch.tensor([len(tails) for _, tails, _ in branches], device=device)
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


def speak(model: nn.Module, tokenizer: Tokenizer, question: Question, **shown: Tensor) -> str:
    """The model's own answer, the likeliest token each time."""
    prompt = tokenizer.encode(question.prompt)
    said = models.generate(model, prompt, ANSWER_TOKENS, tokenizer.end, **shown)
    return tokenizer.decode(said).strip()


def speak_batch(
    model: nn.Module, tokenizer: Tokenizer, questions: list[Question], **shown: Tensor
) -> list[str]:
    """`speak` for several questions at once."""
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    said = models.generate_batch(model, prompts, ANSWER_TOKENS, tokenizer.end, **shown)
    return [tokenizer.decode(tokens).strip() for tokens in said]


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
    if question.options in (("true", "false"), ("yes", "no")):  # is what is asked said before?
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
