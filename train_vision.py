"""Adapt a pretrained vision backbone with SAN, or with what people use instead, and compare.

Ways to use it:
    python train_vision.py                              # sprites, shipped weights, two CPU cores
    python train_vision.py --dataset cifar100           # ViT-B/16 from ImageNet, one GPU
    python train_vision.py --dataset vtab --weights imagenet21k     # the paper's benchmark
    python train_vision.py --compare --task all         # linear, full, LoRA, SSF, SAN and more
    python train_vision.py --ablation                   # what of SAN does what
    python train_vision.py --table runs/…/results.jsonl # the tables of what has been measured
    python train_vision.py --plot runs/…                # pictures of runs
    python train_vision.py --evaluate runs/…            # score a saved run again
"""

import argparse
import copy
import functools
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import models
from lab import checkpoints, loop, methods, paired, pictures, plot, ranks, sprites, tables, variants
from lab.batches import factor_accuracy, factor_loss, loader, outputs_of, prepare
from lab.log import NOWHERE, Log
from lab.pictures import Data, Task, set_name

WEIGHTS = Path(__file__).parent / "weights"
# [us] --compare's rows, each with as many learning rates to choose from
OF_VECTORS, OF_LOW_RANK = (1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2)
LEARNING_RATES = {
    "linear": (3e-3, 1e-2, 3e-2, 1e-1),
    "norm": OF_VECTORS,
    "bias": OF_VECTORS,
    "vpt": OF_VECTORS,
    "lora, r=1": OF_LOW_RANK,
    "lora": OF_LOW_RANK,
    "dora": OF_LOW_RANK,
    "ia3": OF_VECTORS,
    "ssf": OF_VECTORS,
    "hyperadapt": OF_VECTORS,
    "san": OF_VECTORS,
    "san2": OF_VECTORS,
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
}
# the flags of a row that is more than a method's name
ROWS = {"lora, r=1": {"method": "lora", "rank": 1}}
METHODS = [row for row in LEARNING_RATES if row not in ROWS]
# [us] a single run's
DEFAULT_RATES = dict.fromkeys(METHODS, 1e-3)
DEFAULT_RATES |= {"linear": 1e-2, "lora": 5e-4, "dora": 5e-4, "full": 1e-4}
FOR_VIT = ("vpt", "SAN, authors' wiring")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in from data set and method."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=loop.Help)
    add = p.add_argument
    names = ", ".join(["sprites", *pictures.TORCHVISION, *pictures.SUITES])
    add("--dataset", default="sprites", help=f"{names}, or a folder with train/, test/")
    add(
        "--protocol",
        choices=["vtab1k"],
        help="choose on 200 of 1000 labels, train on all; 100 epochs",
    )
    tasks = ["source", *sprites.TASKS, "all"]
    add("--task", default="shape", choices=tasks, help="one of sprites'; all of them for tables")
    add("--data-dir", help="where torchvision's sets and other folders are; by default data")
    add("--shots", type=loop.positive, help="labelled pictures, of all classes; a fifth validates")
    add("--model", nargs="+", choices=list(models.SIZES), help="several with --compare")
    add("--weights", help="imagenet1k, imagenet21k, none or a file; by default the model's own")
    add("--shift", default=True, action=argparse.BooleanOptionalAction, help="train β in SAN")
    add("--wiring", default="san", choices=["san", "authors"], help="authors: ViT alone")
    add("--image-size", type=loop.positive, help="by default what the model is made for")
    add("--workers", type=int, help="processes that load pictures")
    add("--prompts", type=loop.positive, default=10, help="prompts of vpt, before every block")
    add("--pretrain", action="store_true", help="a new backbone: all of it, from nothing")
    add("--ablation", action="store_true", help="SAN's variants compared, as --compare does")
    add("--compile", action="store_true", help="torch.compile what is trained")
    add("--plot", nargs="+", metavar="RUN", help="pictures of runs and comparisons, into --out")
    rows, epochs = [*LEARNING_RATES, *variants.FLAGS], "by default 20, with a protocol 100"
    loop.add_flags(p, METHODS, rows, epochs, batch=32)
    args = p.parse_args(words)
    loop.check_alone(p, args)
    given = loop.given(p, args)
    drawn = args.dataset == "sprites"
    args.protocol = args.protocol or ("vtab1k" if args.dataset == "vtab" else None)
    args.epochs = args.epochs or (100 if args.protocol else 20)  # 100: [P, S]
    args.model = args.model or ["vit_micro" if drawn else "vit_b16"]
    if args.ablation and (args.compare or args.method != "san"):
        p.error("--ablation compares SAN's variants, without --compare or --method")
    if args.pretrain and (tabulates(args) or args.shots or args.method != "san"):
        p.error("--pretrain makes one backbone, without --method, --shots or a comparison")
    if args.pretrain and args.weights not in (None, "none"):
        p.error("--pretrain starts from random weights; leave --weights out")
    if args.pretrain:
        args.method, args.weights = "full", "none"
    if not drawn and args.task != p.get_default("task"):
        p.error("--task is of sprites; leave it out with other data")
    rows = LEARNING_RATES if args.compare else variants.FLAGS if args.ablation else ()
    if other := [row for row in args.methods or () if row not in rows]:
        p.error(f"--methods names rows of --compare or --ablation, and {other[0]!r} is none here")
    if args.protocol and args.shots:
        p.error("--protocol vtab1k says how many pictures are labelled; leave --shots out")
    if not tabulates(args) and (len(args.model) > 1 or args.task == "all"):
        p.error("several models or tasks at once go with --compare, --ablation or --protocol")
    loop.check_flags(p, args, tabulates(args))
    if not args.evaluate:  # which has what the run had
        args.data_dir = args.data_dir or "data"
        if args.workers is None:
            args.workers = 0 if drawn else min(8, torch.get_num_threads())
    if not (tabulates(args) or args.evaluate or args.table or args.plot):
        args.out = args.out or loop.default_out(set_name(args), args.model[0], args, given)
    return args


def tabulates(args: argparse.Namespace) -> bool:
    """Is a table of many runs asked for, with learning rates searched, rather than one run?"""
    return bool(args.compare or args.ablation or args.protocol or args.dataset in pictures.SUITES)


# --------------------------------------------------------------------------------------- the model


def size_of(name: str, args: argparse.Namespace) -> int:
    """Pixels per side of the pictures that a model reads."""
    return args.image_size or models.SIZES[name][1]


def load_model(args: argparse.Namespace, name: str, factors: list[int]) -> nn.Module:
    """The base model with its weights, and a new head with one output per class of every factor."""
    torch.manual_seed(args.seed)  # the head's first values
    model = models.build(name, sum(factors), args.image_size)
    small = models.SIZES[name][1] == 32  # pre-trained here, as nobody publishes such small ones
    weights = args.weights or (WEIGHTS / f"{name}.pt" if small else "imagenet1k")
    if weights == "none":
        return model
    state = checkpoints.backbone_state(weights, name)
    try:
        checkpoints.load_backbone(model, state)
    except ValueError as error:
        raise ValueError(f"--weights {weights} do not fit {name}: {error}") from error
    return model


# -------------------------------------------------------------------------- training and scoring


def fit(
    model: nn.Module,
    data: Data,
    args: argparse.Namespace,
    out: Path | None,
    note: str,
    log: Log = NOWHERE,
) -> list[dict]:
    """Train what requires a gradient: loop.fit on pictures, or on their features."""
    if args.compile:
        torch.compiler.reset()  # it gives up on a class of which it has compiled several models
    forward = torch.compile(model) if args.compile else model
    smoothing, average = (0.1, 0.999) if args.pretrain else (0.0, 0.0)

    def loss_of(_, batch: tuple) -> Tensor:  # forward may be the model compiled
        inputs, labels = batch
        labels = labels.to(args.device, non_blocking=True)
        outputs = forward(prepare(inputs, args.device)).float()
        return factor_loss(outputs, labels, data.factors, smoothing)

    def validate(model: nn.Module) -> float:
        return score(model, data.val, data.factors, args)

    batches = loader(data.train, args, shuffle=True)
    validate = validate if data.val else None
    return loop.fit(model, batches, loss_of, validate, args, out, note, average=average, log=log)


def probe(
    model: nn.Module, data: Data, args: argparse.Namespace, note: str, log: Log = NOWHERE
) -> list[dict]:
    """Train the head alone. The base is frozen, so that its features are computed only once."""
    model.eval()
    train, val = (
        split and TensorDataset(*outputs_of(model.features, split, args, "features"))
        for split in (data.plain, data.val)
    )
    head = copy.deepcopy(model.head).requires_grad_(True)
    args = loop.changed(args, amp=False, compile=False, resume=False)
    history = fit(head, data._replace(train=train, val=val), args, None, note, log)
    model.head = head
    return history


def train(
    model: nn.Module,
    data: Data,
    args: argparse.Namespace,
    out: Path | None,
    note: str,
    log: Log = NOWHERE,
) -> tuple[list[dict], dict]:
    """Train an adapted model in place: the history and figures of loop.train_and_measure."""

    def work() -> list[dict]:
        if args.method == "linear":
            return probe(model, data, args, note, log)
        return fit(model, data, args, out, note, log)

    return loop.train_and_measure(model, args, note, work)


def score(model: nn.Module, split: Dataset, factors: list[int], args: argparse.Namespace) -> float:
    """Accuracy on a split, 0 … 1, averaged over the factors."""
    model.eval()
    accuracies = factor_accuracy(*outputs_of(model, split, args), factors)
    return sum(accuracies) / len(accuracies)


def test(model: nn.Module, data: Data, args: argparse.Namespace) -> tuple[Tensor, dict]:
    """Outputs on the test split, and accuracies, 0 … 1: each factor's and their mean.

    Of one factor also right: which pictures' answers were, as `paired.pack` puts it.
    """
    model.eval()
    outputs, labels = outputs_of(model, data.test, args, "test")
    accuracies = factor_accuracy(outputs, labels, data.factors)
    scores = {"test": sum(accuracies) / len(accuracies), "factors": accuracies}
    if len(data.factors) == 1:
        scores["right"] = paired.pack(outputs.argmax(1) == labels[:, 0])
    return outputs, scores


# -------------------------------------------------------------------------------------- one run


def run(args: argparse.Namespace) -> None:
    """One method on one data set: load, attach, train, score, merge, save."""
    name = args.model[0]
    args.lr = args.lr or DEFAULT_RATES[args.method]
    out = Path(args.out)
    with ranks.first_here():
        data = pictures.load_named(args, size_of(name, args))
        base = load_model(args, name, data.factors)
    model = copy.deepcopy(base)
    methods.adapt(model, args.method, args)  # before anything is written: it may be refused
    base, model = (loop.on_device(m, args.device) for m in (base, model))
    print(
        f"{set_name(args)}: {len(data.train)} training, {len(data.val)} validation and "
        f"{len(data.test)} test pictures, {sum(data.factors)} classes"
    )
    result = {"dataset": set_name(args), "model": name, "method": args.method, "seed": args.seed}
    with loop.begin(args, out) as log:
        started = time.perf_counter()
        if args.weights != "none" and args.method != "linear":  # what the base is worth as it is
            probe(base, data, loop.changed(args, lr=DEFAULT_RATES["linear"]), "linear head")
            result["test_linear"] = score(base, data.test, data.factors, args)
        del base
        history, figures = train(model, data, args, out, args.method, log)
        result |= figures | {"wall": time.perf_counter() - started}
        content = {"model": name, "factors": data.factors, "image_size": model.image_size}
        # save the adapter, score, merge, score again, save the merged model
        scored = functools.partial(test, data=data, args=args)
        loop.conclude(model, args, history, result, scored, content, log=log)


def evaluate_run(args: argparse.Namespace) -> None:
    """Score the merged (or fully trained) model of a saved run on its test split."""
    saved, (state, factors, size), path = loop.reopen(
        args, ("device", "workers", "data_dir"), ("state_dict", "factors", "image_size")
    )
    name = saved.model[0]
    with loop.as_saved_in(args.evaluate), ranks.first_here():
        data = pictures.load_named(saved, size)
    try:
        checkpoints.require_head(state, sum(factors))  # before so large a model is made
        model = models.build(name, sum(factors), size)
        if saved.method == "vpt":  # the one method whose merged model is not the base model's kind
            methods.adapt(model, "vpt", saved)
        checkpoints.load_backbone(model, state, head=True)
    except (ValueError, RuntimeError) as error:  # the latter: a size that no tensor can have
        raise OSError(f"{path} is not of the run that config.json tells: {error}") from error
    model = loop.on_device(model, args.device)
    print(f"test accuracy of {path}  {100 * score(model, data.test, data.factors, saved):.2f} %")


# --------------------------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    """Methods on tasks and models, learning rates chosen on validation; tables of them.

    The methods are args.method; with --compare or --ablation args.methods or all of its rows. With
    args.seeds 0 rates are tried alone, and nothing is scored on the test split. Of several tasks,
    one whose data cannot be had is left out and said so. Raises OSError if none can.
    """
    tasks = pictures.tasks_named(args)
    rows = LEARNING_RATES if args.compare else variants.FLAGS if args.ablation else [args.method]
    rows = args.methods or rows
    rows_of = {
        name: [row for row in rows if row not in FOR_VIT or models.SIZES[name][0] is models.ViT]
        for name in args.model
    }
    if not any(rows_of.values()):
        raise ValueError(f"{[*rows][0]} is for a ViT's tokens alone; give --model vit_… with it")
    for row in dict.fromkeys(row for own in rows_of.values() for row in own):
        print(f"learning rates for {row}: {', '.join(f'{rate:g}' for rate in rates_of(row, args))}")
    kind = "ablation" if args.ablation else args.protocol or "compare"
    args.out = args.out or f"runs/{kind}-{set_name(args)}"
    searches = [
        (key_of(task, name, row), rates_of(row, args))
        for name, own in rows_of.items()
        for task in tasks
        for row in own
    ]
    lines: list[dict] = []
    with tables.journal_of(args, Path(args.out)) as journal:
        tables.announce(
            searches, args, journal, lambda name: time_step(tasks, name, rows_of[name], args)
        )
        for name in args.model:
            for task in tasks:
                if task.lacking:
                    continue
                try:
                    lines += measure(task, name, rows_of[name], args, journal)
                except (OSError, ValueError) as error:
                    if not task.lacking or all(task.lacking for task in tasks):
                        raise
                    print(f"left out: {task.name}, {error}")
        tables.save_tables(lines, Path(args.out))


def measure(
    task: Task, name: str, rows: list[str], args: argparse.Namespace, journal: tables.Journal
) -> list[dict]:
    """Methods or variants on one task with one backbone: the journal's lines of the scored runs.

    With --protocol, what was validated on is trained on as well once the learning rate is chosen.
    """
    # loaded only where the journal leaves something to do
    data = functools.cache(lambda: task.load(size_of(name, args)))

    def train_one(
        row: str, own: argparse.Namespace, note: str, last: bool
    ) -> tuple[nn.Module, dict]:
        labelled = pictures.whole(data()) if last and args.protocol else data()
        model = load_model(own, name, labelled.factors)
        methods.adapt(model, own.method, own)
        if row in variants.CHANGES:
            variants.CHANGES[row](model)
        model = loop.on_device(model, own.device)
        return model, train(model, labelled, own, None, note)[1]

    lines = []
    for row in rows:
        lines += tables.search(
            settings_of(row, args),
            key_of(task, name, row),
            rates_of(row, args),
            functools.partial(train_one, row),
            lambda model: test(model, data(), args),
            journal,
            again=bool(args.protocol),
        )
    return lines


def key_of(task: Task, name: str, row: str) -> dict:
    """What the journal calls a method's or variant's runs on a task."""
    return {"task": task.name, "model": name, "method": row, "group": task.group}


def settings_of(row: str, args: argparse.Namespace) -> argparse.Namespace:
    """The settings of a method or variant."""
    own = variants.FLAGS if args.ablation else ROWS
    return loop.changed(args, **own.get(row, {"method": row}))


def time_step(
    tasks: list[Task], name: str, rows: list[str], args: argparse.Namespace
) -> tuple[float, int]:
    """Seconds of a training step, and steps of a run, on the first task whose data can be had.

    The step is that of full fine-tuning where it is compared: vpt's, LoRA's and DoRA's are slower.
    """
    for task in tasks:
        try:
            data = pictures.load_named(task.args, size_of(name, args))
            break
        except (OSError, ValueError):
            if task is tasks[-1]:
                raise
    few = data._replace(train=pictures.subset(data.train, 0, 4 * args.batch_size), val=None)
    own = settings_of("full" if "full" in rows else rows[0], args)
    own = loop.changed(own, epochs=2, warmup_epochs=0, lr=1e-9)  # the first epoch warms up
    model = load_model(own, name, data.factors)
    methods.adapt(model, own.method, own)
    history = fit(loop.on_device(model, own.device), few, own, None, "timing a step")
    steps = args.epochs * len(loader(data.train, args, shuffle=True))
    return history[-1]["seconds"] / len(loader(few.train, args, shuffle=True)), steps


def rates_of(row: str, args: argparse.Namespace) -> list[float]:
    """The learning rates that a method or variant is given to choose from."""
    return [args.lr] if args.lr else [*LEARNING_RATES["san" if args.ablation else row]]


# ------------------------------------------------------------------------------------- pictures


def draw(args: argparse.Namespace) -> None:
    """PNGs of the runs args.plot, in args.out or in the first of them."""

    def base_of(config: dict) -> dict[str, Tensor]:
        if "model" not in config or config["weights"] == "none":  # train_lm's, or no base at all
            return {}
        saved = argparse.Namespace(**config)
        try:
            return load_model(saved, saved.model[0], factors=[1]).state_dict()
        except (OSError, ValueError) as error:
            print(f"change.png goes without {saved.method}: {error}")
            return {}

    runs = [Path(run) for run in args.plot]
    runs = [run.parent if run.name == "results.jsonl" else run for run in runs]
    for path in plot.draw(runs, Path(args.out or runs[0]), base_of):
        print(f"saved {path}")


def main() -> None:
    with ranks.quiet():
        args = arguments()
    if args.table or args.plot:
        work = tables.print_tables if args.table else draw
    else:
        work = evaluate_run if args.evaluate else compare if tabulates(args) else run
    loop.guard(work, args)


if __name__ == "__main__":
    main()
