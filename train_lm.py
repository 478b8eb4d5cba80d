"""Adapt a LLaMA with SAN, or with what people use instead, and compare.

Four ways to use it:
    python train_lm.py                              # microworld, shipped weights, two CPU cores
    python train_lm.py --weights DIR --data DIR     # a real checkpoint, the eight tasks, one GPU
    python train_lm.py --compare                    # linear, full, LoRA, DoRA, SSF, SAN, …
    python train_lm.py --evaluate runs/…            # score a saved run again
"""

import argparse
import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import checkpoints
import microworld
import models
import questions as question_sets
import san
import tuning

WEIGHTS = Path(__file__).parent / "weights" / "llama_micro.pt"
# [us] the grids of --compare; the first is the default, as validation on microworld chose it
LEARNING_RATES = {
    "linear": (1e-2, 1e-3, 3e-3),
    "full": (1e-3, 3e-4, 3e-3),
    "lora": (1e-2, 1e-3, 3e-3),
    "dora": (1e-2, 1e-3, 3e-3),
    "ssf": (3e-2, 1e-2, 1e-1),
    "san": (3e-2, 1e-2, 1e-1),
    "san+lora": (1e-2, 1e-3, 3e-3),
    "san+dora": (1e-2, 1e-3, 3e-3),
}
DOCUMENTS = 60_000  # of microworld's corpus: one epoch of pre-training
WINDOW = 128  # tokens of the corpus read at once
IGNORE = -100  # the label of a token whose successor is not asked for
ANSWER_TOKENS = 32  # what --score generate lets the model say, as in LLM-Adapters' code


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = p.add_argument
    add("--data", default="microworld", help="or a folder with <task>/train.json and test.json")
    names = ", ".join(question_sets.EIGHT)
    add(
        "--tasks",
        nargs="+",
        default=list(question_sets.EIGHT),
        metavar="TASK",
        help=f"of {names}; corpus: microworld's text itself, for pre-training",
    )
    add("--train-file", help="train on this file in place of every train.json")
    add("--shots", type=tuning.positive, help="labelled questions of a task, with validation's")
    add("--weights", help="a folder of a LLaMA checkpoint, a model.pt, or none; default: shipped")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of frozen weights")
    add(
        "--score",
        choices=["likelihood", "generate"],
        help="take the likeliest option, the default, or the first that the model's own text names",
    )
    tuning.add_flags(p, list(LEARNING_RATES), epochs=5, batch=32)
    args = p.parse_args(words)
    tuning.check_flags(p, args, args.compare)
    args.tasks = list(dict.fromkeys(args.tasks))
    corpus = args.tasks == ["corpus"]
    if "corpus" in args.tasks and (not corpus or args.data != "microworld" or args.compare):
        p.error("--tasks corpus stands alone, with microworld and one method")
    if corpus and (args.shots or args.train_file or args.score):
        p.error("--tasks corpus has no questions: leave --shots, --train-file and --score out")
    if args.score is None and not args.evaluate:
        args.score = "likelihood"
    if args.dtype != "float32" and (args.compare or args.method in ("linear", "full")):
        p.error("linear, full and with them --compare train the weights; give --dtype float32")
    args.wiring, args.shift = "exact", False  # a LLaMA has one wiring, and no bias to shift
    return args


def main() -> None:
    args = arguments()
    work = evaluate_run if args.evaluate else compare if args.compare else run
    tuning.guard(work, args)


# ------------------------------------------------------------------------------ model, tokenizer


def load_model(args: argparse.Namespace) -> tuple[models.LLaMA, question_sets.Tokenizer]:
    """The base model with its weights, on the device, and the tokenizer that goes with it."""
    torch.manual_seed(args.seed)  # of the weights, where there are none to load
    path, dtype = Path(args.weights or WEIGHTS), getattr(torch, args.dtype)
    if args.weights == "none":
        tokenizer = question_sets.microworld_tokenizer()
        model = models.LLaMA(len(tokenizer), **models.LLAMA_MICRO)
    elif not path.exists():
        raise OSError(f"--weights: there is no file {path}, and no such folder")
    elif path.is_dir():
        model, tokenizer = checkpoints.load_llama(path, dtype), question_sets.LlamaTokenizer(path)
    else:
        content = san.read(path)
        content = content if isinstance(content, dict) else {}
        try:
            tokenizer = tokenizer_of(content["tokenizer"])
            model = restore(content["numbers"], content["state_dict"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"--weights {path} holds no LLaMA of ours; give a model.pt of a run, or a folder "
                "with config.json, model.safetensors and tokenizer.json"
            ) from error
    if len(tokenizer) > model.numbers["vocab"]:
        raise ValueError(
            f"--weights {path}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.numbers['vocab']}; they do not belong together"
        )
    for name, parameter in model.named_parameters():  # norms are trained: as precise as γ
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else dtype)
    return model.to(args.device), tokenizer


def restore(numbers: dict, state: dict[str, Tensor]) -> models.LLaMA:
    """A saved model, its weights of the type they were saved in. Raises ValueError."""
    try:
        with torch.device("meta"):  # names and shapes, no memory
            model = models.LLaMA(**numbers)
        model.load_state_dict(state, assign=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"it is broken: {str(error).splitlines()[0]}") from error
    if numbers["tied"]:
        model.head.weight = model.embed.weight
    return model


def tokenizer_of(saved: list[str] | str) -> question_sets.Tokenizer | question_sets.LlamaTokenizer:
    """A saved model's tokenizer: the pieces of ours, or the folder of a checkpoint's."""
    is_folder = isinstance(saved, str)
    return (
        question_sets.LlamaTokenizer(Path(saved)) if is_folder else question_sets.Tokenizer(saved)
    )


# ------------------------------------------------------------------------------------- training


class Job(NamedTuple):
    """What a model is trained on and how it is scored."""

    loader: DataLoader  # of (tokens, labels), both B×N
    validate: Callable[[nn.Module], float]  # accuracy, 0 … 1
    read: Callable[[nn.Module], tuple[Tensor, dict]]  # outputs and accuracies on the test split


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labels that are not IGNORE; the head reads those places alone."""
    asked = labels != IGNORE
    logits = model.head(model.features(tokens)[asked])
    return F.cross_entropy(logits.float(), labels[asked])


def encode(
    question: question_sets.Question, tokenizer: question_sets.Tokenizer
) -> tuple[list[int], int]:
    """Tokens of prompt, answer and end, and where the answer begins.

    Both are written together, as a tokenizer may join what stands at the border.
    """
    prompt = tokenizer.encode(question.prompt)
    tokens = tokenizer.encode(question.prompt + question.output)
    return [*tokens, tokenizer.end], len(os.path.commonprefix([prompt, tokens]))


def collate(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Encoded questions → tokens and labels, B×N, padded to the longest; the prompt has no label.

    A causal model never sees what stands to the right, so that padding needs no mask.
    """
    longest = max(len(tokens) for tokens, _ in batch) - 1
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE)
    for row, (tokens, start) in enumerate(batch):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return inputs, labels


def fit(model: nn.Module, job: Job, args, out: Path | None, note: str) -> list[dict]:
    """tuning.fit on a job's batches, with token_loss."""

    def loss_of(model: nn.Module, batch: tuple) -> Tensor:
        return token_loss(model, *(x.to(args.device, non_blocking=True) for x in batch))

    unit = "windows" if args.tasks == ["corpus"] else "questions"
    return tuning.fit(model, job.loader, loss_of, job.validate, args, out, note, unit)


# -------------------------------------------------------------------------------------- scoring


class Branch(NamedTuple):
    """A question with its options: the tokens all options share, and how each goes on."""

    shared: list[int]
    tails: list[list[int]]


@functools.cache  # the same questions are scored after every epoch
def branch(question: question_sets.Question, tokenizer: question_sets.Tokenizer) -> Branch:
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


ABSENT = -1e9  # the score of an option that a question does not have


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


def speak(
    model: nn.Module, tokenizer: question_sets.Tokenizer, question: question_sets.Question
) -> str:
    """The model's own answer, the likeliest token each time."""
    prompt = tokenizer.encode(question.prompt)
    return tokenizer.decode(models.generate(model, prompt, ANSWER_TOKENS, tokenizer.end)).strip()


def answer(
    model: nn.Module,
    questions: list[question_sets.Question],
    tokenizer: question_sets.Tokenizer,
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


def accuracy(scores: Tensor, questions: list[question_sets.Question]) -> float:
    """Share of right answers, 0 … 1; a tie, as between options none of which is named, is wrong."""
    best = scores.max(1)
    alone = (scores == best.values[:, None]).sum(1) == 1
    right = torch.tensor([question.answer for question in questions])
    return ((best.indices == right) & alone).float().mean().item()


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------------------- what is trained on


def questions_job(
    questions: question_sets.Questions,
    model: models.LLaMA,
    tokenizer: question_sets.Tokenizer,
    args,
) -> Job:
    """Answers are learned, options scored. Training examples beyond the context are left out.

    Raises ValueError if a question to be scored is longer than the context, or none is left.
    """
    for task, asked in [*questions.val.items(), *questions.test.items()]:
        for i, question in enumerate(asked):
            shared, tails = branch(question, tokenizer)
            if (length := len(shared) + max(map(len, tails))) > model.context:
                raise ValueError(
                    f"{task}, question {i}: prompt and answer of {length} tokens exceed the "
                    f"context of {model.context}; take a model with a longer one, or other --tasks"
                )
    encoded = [encode(q, tokenizer) for asked in questions.train.values() for q in asked]
    kept = [pair for pair in encoded if len(pair[0]) <= model.context]
    if len(kept) < len(encoded):
        print(f"left out: {len(encoded) - len(kept)} training examples beyond the context")
    if not kept:
        raise ValueError(f"no training example fits into the context of {model.context} tokens")

    def validate(model: nn.Module) -> float:
        val = questions.val.values()
        return mean(accuracy(answer(model, asked, tokenizer, args), asked) for asked in val)

    def read(model: nn.Module) -> tuple[Tensor, dict]:
        """Every option's score, and the accuracies, 0 … 1: each task's and their mean."""
        asked = questions.test
        scores = {task: answer(model, asked[task], tokenizer, args) for task in asked}
        parts = {task: accuracy(scores[task], asked[task]) for task in asked}
        most = max(s.shape[1] for s in scores.values())
        rows = [F.pad(s, (0, most - s.shape[1]), value=ABSENT) for s in scores.values()]
        return torch.cat(rows), {"test": mean(parts.values()), "parts": parts}

    loader = DataLoader(kept, args.batch_size, shuffle=True, collate_fn=collate)
    return Job(loader, validate, read)


def corpus_job(tokenizer: question_sets.Tokenizer, args) -> Job:
    """microworld's documents in a row, cut into windows; every token is to be predicted."""

    def windows(count: int, seed: int) -> TensorDataset:
        documents = microworld.corpus(count, seed)
        row = [n for text in documents for n in [*tokenizer.encode(text), tokenizer.end]]
        n = (len(row) - 1) // WINDOW
        tokens = torch.tensor(row[: n * WINDOW + 1])
        return TensorDataset(tokens[:-1].view(n, WINDOW), tokens[1:].view(n, WINDOW))

    @torch.no_grad()
    def read(model: nn.Module, split: TensorDataset) -> tuple[Tensor, dict]:
        """The first batch's logits; accuracy of the next token, 0 … 1, and perplexity."""
        model.eval()
        hits, losses, first = [], [], None
        for tokens, labels in DataLoader(split, 64):
            logits = model(tokens.to(args.device)).float().cpu()
            first = logits if first is None else first
            hits.append((logits.argmax(-1) == labels).float())
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
        perplexity = torch.cat(losses).mean().exp().item()
        return first, {"test": torch.cat(hits).mean().item(), "perplexity": perplexity}

    val, test = windows(1000, seed=1), windows(2000, seed=2)
    loader = DataLoader(windows(DOCUMENTS, seed=0), args.batch_size, shuffle=True)
    return Job(loader, lambda model: read(model, val)[1]["test"], lambda model: read(model, test))


# --------------------------------------------------------------------------- what a guess would get


def overlap_scores(question: question_sets.Question) -> list[float]:
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


def guesses(
    train: list[question_sets.Question], asked: list[question_sets.Question]
) -> dict[str, float]:
    """Accuracies, 0 … 1, without any understanding, measured on `asked`.

    chance: any option; constant: the option that was right most often in training, whatever is
    asked; position: the best place of all, chosen on `asked` itself; overlap: the option that
    shares the most words with the question. A tie is worth its share.
    """
    named = Counter(q.options[q.answer] for q in train)

    def share(question: question_sets.Question, scores: list[float]) -> float:
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        return (question.answer in best) / len(best)

    places = range(max(len(q.options) for q in asked))
    return {
        "chance": mean(1 / len(q.options) for q in asked),
        "constant": mean(share(q, [named[option] for option in q.options]) for q in asked),
        "position": max(mean(q.answer == place for q in asked) for place in places),
        "overlap": mean(share(q, overlap_scores(q)) for q in asked),
    }


# ------------------------------------------------------------------------------------- one run


def load_job(
    args, model: models.LLaMA, tokenizer: question_sets.Tokenizer
) -> tuple[Job, question_sets.Questions | None]:
    """The job, and its questions; the corpus has none."""
    if args.tasks == ["corpus"]:
        return corpus_job(tokenizer, args), None
    questions = question_sets.load_questions(args.data, args.tasks, args.train_file, args.shots)
    print(
        f"{args.data}: {sum(map(len, questions.train.values()))} training, "
        f"{sum(map(len, questions.val.values()))} validation and "
        f"{sum(map(len, questions.test.values()))} test questions of {len(args.tasks)} tasks"
    )
    return questions_job(questions, model, tokenizer, args), questions


def names_of(args: argparse.Namespace) -> tuple[str, str]:
    """How files and tables call the data and the model."""
    corpus = args.tasks == ["corpus"]
    task = "corpus" if corpus else Path(args.data).resolve().name
    if args.weights == "none":
        return task, "untrained"
    path = Path(args.weights or WEIGHTS).resolve()
    if path.name in ("model.pt", "merged.pt"):  # of a run, whose folder has the better name
        path = path.parent
    return task, path.name.removesuffix(".pt")


def adapted(model: models.LLaMA, args: argparse.Namespace) -> models.LLaMA:
    """The model itself, made ready for args.method."""
    torch.manual_seed(args.seed)  # of LoRA's A
    tuning.adapt(model, args.method, args)
    return model


def run(args: argparse.Namespace) -> None:
    """One method on all tasks together: train, score, merge and save; answers before and after."""
    args.lr = args.lr or LEARNING_RATES[args.method][0]
    task, name = names_of(args)
    args.out = args.out or f"runs/{task}-{name}-{args.method}-seed{args.seed}"
    model, tokenizer = load_model(args)
    job, questions = load_job(args, model, tokenizer)
    result = {"dataset": task, "model": name, "method": args.method, "seed": args.seed}
    tuning.begin(args, Path(args.out))
    started = time.perf_counter()
    before, shown = {}, []
    if questions and args.weights != "none":
        for part, asked in questions.test.items():
            before[part] = accuracy(answer(model, asked, tokenizer, args), asked)
        shown = [asked[0] for asked in questions.test.values()][:4]
        result["test_base"] = mean(before.values())
    said = [speak(model, tokenizer, question) for question in shown]
    adapted(model, args)
    history, figures = tuning.train_and_measure(
        model, args, args.method, lambda: fit(model, job, args, Path(args.out), args.method)
    )
    result |= figures | {"wall": time.perf_counter() - started}
    content = {"numbers": model.numbers, "tokenizer": tokenizer.saved}
    tuning.conclude(model, args, history, result, job.read, content)
    if not questions:
        return
    rows = []
    for part, asked in questions.test.items():
        everything = [q for some in questions.train.values() for q in some]
        shares = guesses(questions.train.get(part, everything), asked)
        if before:
            shares["before"] = before[part]
        shares["after"] = result["parts"][part]
        percent = {key: f"{100 * share:.1f}" for key, share in shares.items()}
        rows.append({"task": part, "questions": len(asked)} | percent)
    print("\ntest accuracy in per cent, and what guesses get\n" + tuning.markdown(rows))
    if shown:
        print("in the model's own words:\n")
    for question, first in zip(shown, said):
        text = question.prompt.split("### Instruction:\n")[1].split("\n\n### Response")[0]
        print(f"{text}\n  before: {first}\n  after:  {speak(model, tokenizer, question)}")
        print(f"  right:  {question.output}\n")


def evaluate_run(args: argparse.Namespace) -> None:
    """Score the merged (or fully trained) model of a saved run on its test questions."""
    own = ("device", "score") if args.score else ("device",)
    saved, (state, numbers, tokenizer), path = tuning.reopen(
        args, own, ("state_dict", "numbers", "tokenizer")
    )
    tokenizer = tokenizer_of(tokenizer)
    model = restore(numbers, state).to(args.device)
    job, _ = load_job(saved, model, tokenizer)
    print(f"test accuracy of {path}  {100 * job.read(model)[1]['test']:.2f} %")


def compare(args: argparse.Namespace) -> None:
    """Every method on all tasks together, learning rates chosen on validation; one table."""
    task, name = names_of(args)
    model, tokenizer = load_model(args)
    job, _ = load_job(args, model, tokenizer)
    del model

    def work(key: dict, journal: tuning.Journal) -> list[dict]:
        def train_one(own: argparse.Namespace, last: bool) -> tuple[nn.Module, dict]:
            model = adapted(load_model(own)[0], own)
            note = f"{own.method} seed {own.seed}"
            return model, tuning.train_and_measure(
                model, own, note, lambda: fit(model, job, own, None, note)
            )[1]

        rates = LEARNING_RATES[key["method"]]
        return tuning.search(args, key, rates, train_one, job.read, journal)

    keys = [{"task": task, "model": name, "method": method} for method in LEARNING_RATES]
    args.out = args.out or f"runs/compare-{task}-{name}"
    tuning.compare(args, Path(args.out), keys, work)


if __name__ == "__main__":
    main()
