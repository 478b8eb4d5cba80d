"""Adapt a LLaMA, or a LLaVA on pictures, with SAN or what people use instead, and compare.

Ways to use it:
    python train_lm.py                              # microworld, shipped weights, two CPU cores
    python train_lm.py --weights DIR --data DIR     # a real checkpoint, the eight tasks, one GPU
    python train_lm.py --data scenes                # questions about pictures, a small LLaVA
    python train_lm.py --compare                    # linear, full, LoRA, DoRA, SSF, SAN, …
    python train_lm.py --table runs/…/results.jsonl # the tables of what has been measured
    python train_lm.py --evaluate runs/…            # score a saved run again
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import models
import san
from lab import (
    llama,
    llava,
    loop,
    methods,
    microworld,
    paired,
    questions,
    ranks,
    saved,
    tables,
    visual,
)
from lab.checkpoints import in_one_line
from lab.log import NOWHERE, Log
from lab.questions import IGNORE, LlamaTokenizer, Questions, Tokenizer, encode
from lab.scoring import ABSENT, accuracy, answer, branch, guesses, mean, per_character, speak

WEIGHTS = Path(__file__).parent / "weights" / "llama_micro.pt"
SEEING = WEIGHTS.with_name("llava_micro.pt")
# [us] --compare's rows, each with as many learning rates to choose from
OF_VECTORS, OF_MATRICES = (1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2)
LEARNING_RATES = {
    "linear": OF_MATRICES,
    "norm": OF_VECTORS,
    "lora": OF_MATRICES,
    "lora, r=32": OF_MATRICES,
    "dora": OF_MATRICES,
    "ia3": OF_VECTORS,
    "ssf": OF_VECTORS,
    "hyperadapt": OF_VECTORS,
    "san": OF_VECTORS,
    "san+lora": OF_MATRICES,
    "san+dora": OF_MATRICES,
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
}
# the flags of a row that is more than a method's name; rank and α of the papers' language results
ROWS = {"lora, r=32": {"method": "lora", "rank": 32, "alpha": 64.0}}
METHODS = [row for row in LEARNING_RATES if row not in ROWS]
# [us] a single run's, for our own models; where microworld's validation chose, it chose the largest
DEFAULT_RATES = {method: max(LEARNING_RATES[method]) for method in METHODS}
FOR_OTHERS = 0.1  # [us] times these, for others' models, as SmolLM2's validation chose in 5 of 5
HELD = ("state_dict", "numbers", "tokenizer")  # by the file of a saved model
DOCUMENTS = 60_000  # of microworld's corpus: one epoch of pre-training
WINDOW = 128  # tokens of the corpus read at once


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=loop.Help)
    add = p.add_argument
    add(
        "--data",
        default="microworld",
        help="or scenes, easy-vqa, a folder with <task>/train.json and test.json, or a folder with "
        "train.json and test.json in LLaVA's own JSON",
    )
    names = ", ".join(questions.EIGHT)
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"of {names}; corpus: microworld's text itself, for pre-training; of scenes the seven "
        "sets, or captions and descriptions for pre-training; by default all tasks of the data",
    )
    add("--train-file", help="train on this file in place of every train.json")
    add("--shots", type=loop.positive, help="labelled questions of a task; 200 or a fifth validate")
    add("--test-shots", type=loop.positive, help="score on so many test questions of a task")
    add("--weights", help="a folder, .gguf or model.pt, smollm2, or none; default: shipped")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of frozen weights")
    add(
        "--score",
        choices=["likelihood", "generate"],
        help="take the likeliest option, the default, or the first that the model's own text names",
    )
    add(
        "--ask",
        choices=["words", "options"],
        help="score each option's own words, the default with likelihood, or the numbers of a list",
    )
    add("--shard", action="store_true", help="share the weights among torchrun's ranks")
    visual.add_flags(p)
    loop.add_flags(p, [*METHODS, "projector"], LEARNING_RATES, "by default 5, of scenes 3", 32)
    args = p.parse_args(words)
    loop.check_alone(p, args)
    p.set_defaults(epochs=3 if args.data == "scenes" else 5)
    args.epochs = args.epochs or p.get_default("epochs")
    given = loop.given(p, args)
    loop.check_flags(p, args, args.compare)
    if args.methods and not args.compare:
        p.error("--methods names those of --compare; a run has one --method")
    visual.check_flags(p, args)
    seeing = visual.is_visual(args.data)
    tasks = visual.tasks_of(args.data) if seeing else questions.EIGHT
    args.tasks = list(dict.fromkeys(args.tasks or tasks))
    corpus = args.tasks == ["corpus"]
    if args.shard and ranks.count() == 1:
        p.error("--shard shares a model among ranks: torchrun --nproc_per_node=N train_lm.py …")
    if args.shard and (seeing or args.gamma_std):
        p.error("--shard is for a LLaMA without pictures, whose γ start at 1")
    if "corpus" in args.tasks and (not corpus or args.data != "microworld" or args.compare):
        p.error("--tasks corpus stands alone, with microworld and one method")
    asking = (args.shots, args.test_shots, args.train_file, args.score, args.ask)
    if corpus and any(asking):
        p.error("--tasks corpus has no questions: leave all flags out that are about them")
    if args.score == "generate" and args.ask == "words":
        p.error("--score generate looks for the names of a list: leave --ask words out")
    worded = (args.data == "microworld" or seeing) and not args.evaluate
    if worded and args.ask == "words":
        p.error("--ask words is for the eight tasks in files; other lists have the options' words")
    if args.score is None and (args.ask == "words" or not args.evaluate):
        args.score = "likelihood"
    if args.ask is None and (args.score == "generate" or not args.evaluate):
        args.ask = "options" if worded or args.score == "generate" else "words"
    trained = (args.methods or METHODS) if args.compare else [args.method]
    if args.dtype != "float32" and {"linear", "full"} & {*trained}:
        p.error("linear and full train the weights themselves; give --dtype float32")
    # a LLaMA has one wiring, and no bias to shift, but a LLaVA's tower has
    args.wiring, args.shift = "san", args.tower
    if not (args.compare or args.evaluate):
        args.out = args.out or loop.default_out(*names_of(args), args, given)
    return args


# ------------------------------------------------------------------------------ model, tokenizer


def default_weights(args: argparse.Namespace) -> Path:
    return Path(args.weights or (SEEING if visual.is_visual(args.data) else WEIGHTS))


def load_model(args: argparse.Namespace) -> tuple[models.LLaMA, Tokenizer | LlamaTokenizer]:
    """The base model with its weights, and the tokenizer that goes with it.

    The model is on the device, or, if it is to be sharded, on the CPU.
    """
    torch.manual_seed(args.seed)  # of the weights, where there are none to load
    path, dtype = default_weights(args), getattr(torch, args.dtype)
    if args.weights == "smollm2" and not path.exists():
        path = llama.smollm2()
    if args.weights == "none" and visual.is_visual(args.data):
        tokenizer = visual.scenes_tokenizer()
        model = visual.untrained(tokenizer)
    elif args.weights == "none":
        tokenizer = questions.microworld_tokenizer()
        model = models.LLaMA(len(tokenizer), **models.LLAMA_MICRO)
    elif not path.exists():
        raise OSError(f"--weights: there is no file {path}, and no such folder")
    elif path.is_dir() or path.suffix == ".gguf":
        model, tokenizer = llava.load(path, dtype), LlamaTokenizer(path)
    else:
        content = san.read(path)
        try:
            saved.require(content, {name: saved.MODEL[name] for name in HELD})
            model, tokenizer = restored(*(content[name] for name in HELD))
        except ValueError as error:
            raise ValueError(
                f"--weights {path} holds no LLaMA of ours ({error}); give a model.pt of a run, or "
                "a folder with config.json, model.safetensors and tokenizer.json"
            ) from error
    try:
        require_together(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"--weights {path}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(llama.dtype_of(name, dtype))
    return model if args.shard else model.to(args.device), tokenizer


def restored(
    state: dict[str, Tensor], numbers: dict, pieces: list[str] | str
) -> tuple[models.LLaMA, Tokenizer | LlamaTokenizer]:
    """A saved model, its weights of the type they were saved in, and its tokenizer.

    pieces: those of our tokenizer, or the address of a checkpoint's. Raises ValueError, and OSError
    if that is missing.
    """
    saved.require(numbers, saved.NUMBERS, saved.SEEING)
    try:
        with torch.device("meta"):  # names and shapes, no memory
            model = (models.LLaVA if "tower" in numbers else models.LLaMA)(**numbers)
        model.load_state_dict(state, assign=True)
    except Exception as error:  # a scaling of positions may hold anything
        raise ValueError(f"it is broken: {in_one_line(error)[:200]}") from error
    if numbers["tied"]:
        model.head.weight = model.embed.weight
    own = LlamaTokenizer(Path(pieces)) if isinstance(pieces, str) else Tokenizer(pieces)
    return model, own


def require_together(model: models.LLaMA, tokenizer: Tokenizer | LlamaTokenizer) -> None:
    """Raise ValueError if the tokenizer has numbers that the model has no row for."""
    if len(tokenizer) > model.config["vocab"]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.config['vocab']}; they do not belong together"
        )


def names_of(args: argparse.Namespace) -> tuple[str, str]:
    """How files and tables call the data and the model."""
    corpus = args.tasks == ["corpus"]
    task = "corpus" if corpus else Path(args.data).resolve().name
    if args.weights == "none":
        return task, "untrained"
    path = default_weights(args).resolve()
    if path.name in ("model.pt", "merged.pt", "merged"):  # of a run: its folder's name says more
        path = path.parent
    return task, path.name.removesuffix(".pt").removesuffix(".gguf")


# ------------------------------------------------------------------------------------------ data


class Job(NamedTuple):
    """What a model is trained on and how it is scored."""

    loader: DataLoader  # of (tokens, labels), both B×N; and with pictures, bytes B×3×H×W
    validate: Callable[[nn.Module], float]  # accuracy, 0 … 1
    test: Callable[[nn.Module], tuple[Tensor, dict]]  # outputs and accuracies on the test split
    check: Callable[[nn.Module], Tensor]  # outputs on the validation split


def load_job(
    args: argparse.Namespace, model: models.LLaMA, tokenizer: Tokenizer | LlamaTokenizer
) -> tuple[Job, Questions | None]:
    """The job, and its questions; the corpus has none."""
    if args.tasks == ["corpus"]:
        return corpus_job(tokenizer, args), None
    if visual.is_visual(args.data):
        if not args.blind:
            visual.require_token(model, tokenizer)
        asked = visual.load(args, model)
    else:
        with ranks.first_here():
            asked = questions.load_questions(
                args.data, args.tasks, args.train_file, args.shots, args.ask, args.test_shots
            )
    print(
        f"{args.data}: {sum(map(len, asked.train.values()))} training, "
        f"{sum(map(len, asked.val.values()))} validation and "
        f"{sum(map(len, asked.test.values()))} test questions of {len(args.tasks)} tasks"
    )
    return questions_job(asked, model, tokenizer, args), asked


def questions_job(
    asked: Questions,
    model: models.LLaMA,
    tokenizer: Tokenizer | LlamaTokenizer,
    args: argparse.Namespace,
) -> Job:
    """Answers are learned, options scored. Training examples beyond the context are left out.

    Raises ValueError if a question to be scored is longer than the context, or none is left.
    """
    for task, scored in [*asked.val.items(), *asked.test.items()]:
        for i, question in enumerate(scored):
            own = branch(question, tokenizer)
            if (length := len(own.shared) + max(map(len, own.tails))) > model.context:
                raise ValueError(
                    f"{task}, question {i}: prompt and answer of {length} tokens exceed the "
                    f"context of {model.context}; take a model with a longer one, or other --tasks"
                )
    read, show = visual.collated(asked.pictures), visual.shower(asked.pictures, args.device)

    def encoded_of(split: dict[str, list[questions.Question]]) -> list[tuple]:
        return [(*encode(q, tokenizer), q.picture) for own in split.values() for q in own]

    encoded = encoded_of(asked.train)
    kept = [one for one in encoded if len(one[0]) <= model.context]
    if len(kept) < len(encoded):
        print(f"left out: {len(encoded) - len(kept)} training examples beyond the context")
    if not kept:
        raise ValueError(f"no training example fits into the context of {model.context} tokens")
    learned = functools.partial(ranks.collate, read)
    loader = DataLoader(kept, args.batch_size, shuffle=True, collate_fn=learned)
    if visual.has_texts(asked):
        if args.score == "generate":
            raise ValueError("--score generate is for questions with options, which these lack")
        scored = (encoded_of(split) for split in (asked.val, asked.test))
        return words_job(loader, *(DataLoader(own, 64, collate_fn=read) for own in scored), args)

    def answers(model: nn.Module, own: list[questions.Question]) -> Tensor:
        return answer(model, own, tokenizer, args, show)

    def validate(model: nn.Module) -> float:
        val = asked.val.items()
        return mean(visual.parts(task, answers(model, own), own)[task] for task, own in val)

    def test(model: nn.Module) -> tuple[Tensor, dict]:
        """Every option's score, and the accuracies, 0 … 1: each task's and their mean."""
        scores = {task: answers(model, own) for task, own in asked.test.items()}
        return in_rows(scores.values()), accuracies(scores, asked.test, args)

    def check(model: nn.Module) -> Tensor:
        return in_rows(answers(model, own) for own in asked.val.values())

    return Job(loader, validate, test, check)


def in_rows(scores: Iterable[Tensor]) -> Tensor:
    """All questions' scores below each other; what has fewer options is filled up."""
    scores = [*scores]
    most = max(s.shape[1] for s in scores)
    return torch.cat([F.pad(s, (0, most - s.shape[1]), value=ABSENT) for s in scores])


def accuracies(
    scores: dict[str, Tensor], asked: dict[str, list[questions.Question]], args: argparse.Namespace
) -> dict:
    """Of scores by task: parts, each task's accuracy, 0 … 1, and test, their mean.

    parts_right tells what each answer is worth, as `paired.pack` puts it. POPE has parts more, as
    `visual.parts` says. With --ask words also parts_norm and test_norm, by log-likelihood
    `per_character`.
    """
    parts, right = {}, {}
    for task, own in asked.items():
        parts |= visual.parts(task, scores[task], own)
        right[task] = paired.pack(visual.counted(task, scores[task], own))
    figures = {"test": mean(parts[task] for task in asked), "parts": parts, "parts_right": right}
    if args.ask == "words":
        norm = {t: accuracy(per_character(scores[t], own), own) for t, own in asked.items()}
        figures |= {"test_norm": mean(norm.values()), "parts_norm": norm}
    return figures


def corpus_job(tokenizer: Tokenizer, args: argparse.Namespace) -> Job:
    """microworld's documents in a row, cut into windows; every token is to be predicted."""

    def windows(count: int, seed: int) -> TensorDataset:
        documents = microworld.corpus(count, seed)
        row = [n for text in documents for n in [*tokenizer.encode(text), tokenizer.end]]
        n = (len(row) - 1) // WINDOW
        tokens = torch.tensor(row[: n * WINDOW + 1])
        return TensorDataset(tokens[:-1].view(n, WINDOW), tokens[1:].view(n, WINDOW))

    val, test = (DataLoader(windows(n, seed), 64) for n, seed in ((1000, 1), (2000, 2)))
    learned = functools.partial(ranks.collate, default_collate)
    train = DataLoader(windows(DOCUMENTS, 0), args.batch_size, shuffle=True, collate_fn=learned)
    return words_job(train, val, test, args)


def words_job(loader: DataLoader, val: DataLoader, test: DataLoader, args) -> Job:
    """Every word of a text is learned, and scored by the share that is predicted right."""
    predict = functools.partial(visual.next_words, device=args.device)
    return Job(
        loader,
        lambda model: predict(model, val)[1]["test"],
        lambda model: predict(model, test),
        lambda model: predict(model, val)[0],
    )


# -------------------------------------------------------------------------------------- training


def adapt(model: models.LLaMA, args: argparse.Namespace) -> models.LLaMA:
    """The model itself, frozen and with what args.method trains attached."""
    torch.manual_seed(args.seed)  # of LoRA's A
    blind = args.blind or not visual.is_visual(args.data)  # what reads no picture is not trained
    methods.adapt(model, args.method, loop.changed(args, blind=blind))
    return model


def fit(
    model: nn.Module,
    job: Job,
    args: argparse.Namespace,
    out: Path | None,
    note: str,
    log: Log = NOWHERE,
) -> list[dict]:
    """Train what requires a gradient: loop.fit on questions, or on the corpus."""

    def loss_of(model: nn.Module, batch: tuple) -> Tensor:
        return visual.loss(model, batch, args.device)

    def learned(batch: tuple) -> int:
        return (batch[1] != IGNORE).sum().item()

    unit = "windows" if args.tasks == ["corpus"] else "questions"
    own = {"weigh": learned, "log": log}
    if ranks.is_sharded(model):
        own["spare"] = torch.zeros(2, 1, 1, dtype=torch.long).unbind()
    return loop.fit(model, job.loader, loss_of, job.validate, args, out, note, unit, **own)


def train(
    model: nn.Module,
    job: Job,
    args: argparse.Namespace,
    out: Path | None,
    note: str,
    log: Log = NOWHERE,
) -> tuple[list[dict], dict]:
    """Train an adapted model in place: loop.train_and_measure's history and figures."""
    return loop.train_and_measure(model, args, note, lambda: fit(model, job, args, out, note, log))


def default_rate(method: str, tokenizer: Tokenizer | LlamaTokenizer) -> float:
    """A single run's learning rate without --lr; the tokenizer tells whether the model is ours."""
    if method == "projector":
        return visual.PROJECTOR_RATE
    return DEFAULT_RATES[method] * (1 if isinstance(tokenizer, Tokenizer) else FOR_OTHERS)


def run(args: argparse.Namespace) -> None:
    """One method on all tasks together: load, attach, train, score, merge, save."""
    task, name = names_of(args)
    model, tokenizer = load_model(args)
    args.lr = args.lr or default_rate(args.method, tokenizer)
    job, asked = load_job(args, model, tokenizer)
    if args.shard:  # no GPU ever has it whole; before it is trained, it computes as the base
        ranks.shard(adapt(model, args), args.device)
    result = {"dataset": task, "model": name, "method": args.method, "seed": args.seed}
    before, shown, show = {}, {}, visual.shower(asked and asked.pictures, args.device)

    def speech() -> list[str]:
        return [speak(model, tokenizer, asks, **show([asks])) for asks in shown.values()]

    with loop.begin(args, Path(args.out)) as log:
        started = time.perf_counter()
        if asked and args.weights != "none":  # what the base is worth as it is
            before = job.test(model)[1]
            most = 4 if asked.pictures is None else None
            if args.shard or not ranks.number():
                shown = {t: own[0] for t, own in [*asked.test.items()][:most] if own[0].prompt}
                visual.save_pictures(shown, asked.pictures, Path(args.out))
            result["test_base"] = before["test"]
        said = speech()
        adapted = model if args.shard else adapt(model, args)
        history, figures = train(adapted, job, args, Path(args.out), args.method, log)
        result |= figures | {"wall": time.perf_counter() - started}
        content = {"numbers": model.config, "tokenizer": tokenizer.saved}

        def export(merged: models.LLaMA, state: dict[str, Tensor]) -> None:
            llama.export(merged, tokenizer, Path(args.out) / "merged", state)

        # save the adapter, score, merge, score again, save the merged model
        loop.conclude(model, args, history, result, job.test, content, export, log)
        if "parts" in result:
            print_beside_guesses(asked, before, result, args)
        if shown:
            print("in the model's own words:\n")
            for (task, question), before, after in zip(shown.items(), said, speech()):
                print(f"{visual.heading(task, question)}\n  before: {before}\n  after:  {after}")
                print(f"  right:  {question.output.strip()}\n")


def print_beside_guesses(
    asked: Questions, before: dict, after: dict, args: argparse.Namespace
) -> None:
    """A table: each task's accuracy before and after training, and what guesses get.

    before, after: `accuracies`, with a column for those by length. Where test questions were drawn,
    with the binomial standard error √(p (1 − p) / n) of a share p of n questions.
    """
    everything, rows = [q for own in asked.train.values() for q in own], []
    seeing, drawn = visual.is_visual(args.data), args.test_shots
    for task, own in asked.test.items():
        chosen, count = asked.train.get(task, everything), len(own) // visual.in_a_row(task, own)
        shares = visual.guesses(task, chosen, own) if seeing else guesses(chosen, own)
        row = {name: f"{100 * share:.1f}" for name, share in shares.items()}
        for key, label in (("parts", ""), ("parts_norm", ", by length")):
            for when, figures in (("before", before), ("after", after)):
                if key in figures:
                    p = figures[key][task]
                    error = f" ± {tables.binomial(p, count)}" if drawn else ""
                    row[when + label] = f"{100 * p:.1f}{error}"
        rows.append({"task": task, "questions": len(own)} | row)
    note = f", on {drawn} test questions of a task at most" if drawn else ""
    print(f"\ntest accuracy in per cent{note}, and what guesses get\n{tables.markdown(rows)}")
    for part in (part for part in after["parts"] if part not in asked.test):
        print(f"{part}: {100 * after['parts'][part]:.1f}")


def evaluate_run(args: argparse.Namespace) -> None:
    """Score the merged (or fully trained) model of a saved run on its test questions."""
    own = ("device", "shard", "score", "ask", "data_dir")
    config, content, path = loop.reopen(args, own, HELD)
    try:
        model, tokenizer = restored(*content)
        require_together(model, tokenizer)
    except (ValueError, OSError) as error:
        raise OSError(f"{path} holds no LLaMA of ours: {in_one_line(error)}") from error
    model = ranks.shard(model, args.device) if args.shard else model.to(args.device)
    with loop.as_saved_in(args.evaluate):
        job, _ = load_job(config, model, tokenizer)
    figures = job.test(model)[1]
    more = f", by length {100 * figures['test_norm']:.2f} %" if "test_norm" in figures else ""
    more += f", perplexity {figures['perplexity']:.3f}" if "perplexity" in figures else ""
    print(f"test accuracy of {path}  {100 * figures['test']:.2f} %{more}")


def compare(args: argparse.Namespace) -> None:
    """Methods on all tasks together, learning rates chosen on validation; tables of them.

    The methods are args.methods, or all. Merges are checked on the validation questions: scoring
    takes most of the time.
    """
    rows = args.methods or [*LEARNING_RATES]
    task, name = names_of(args)
    job, _ = load_job(args, *load_model(args))
    args.out = args.out or f"runs/compare-{task}-{name}"
    lines: list[dict] = []

    def train_one(own: argparse.Namespace, note: str, last: bool) -> tuple[nn.Module, dict]:
        model = adapt(load_model(own)[0], own)
        return model, train(model, job, own, None, note)[1]

    def time_step(name: str) -> tuple[float, int]:
        """Seconds of a training step, of full fine-tuning where it is compared; steps of a run."""
        some = job.loader.dataset[: 4 * args.batch_size]
        few = DataLoader(some, args.batch_size, collate_fn=job.loader.collate_fn)
        own = settings_of("full" if "full" in rows else rows[0], args)
        own = loop.changed(own, epochs=2, warmup_epochs=0, lr=1e-9)  # the first epoch warms up
        model = adapt(load_model(own)[0], own)
        history = fit(model, job._replace(loader=few, validate=None), own, None, "timing a step")
        return history[-1]["seconds"] / len(few), args.epochs * len(job.loader)

    searches = [
        (
            {"task": task, "model": name, "method": row},
            [args.lr] if args.lr else [*LEARNING_RATES[row]],
        )
        for row in rows
    ]
    with tables.journal_of(args, Path(args.out)) as journal:
        tables.announce(searches, args, journal, time_step)
        for key, rates in searches:
            own = settings_of(key["method"], args)
            lines += tables.search(own, key, rates, train_one, job.test, journal, check=job.check)
        tables.save_tables(lines, Path(args.out))


def settings_of(row: str, args: argparse.Namespace) -> argparse.Namespace:
    """The settings of one of --compare's rows."""
    return loop.changed(args, **ROWS.get(row, {"method": row}))


def main() -> None:
    with ranks.quiet():
        args = arguments()
    work = evaluate_run if args.evaluate else compare if args.compare else run
    loop.guard(tables.print_tables if args.table else work, args)


if __name__ == "__main__":
    main()
