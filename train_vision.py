"""Adapt a pretrained vision backbone with SAN, or with what people use instead, and compare.

Ways to use it:
    python train_vision.py                              # sprites, shipped weights, two CPU cores
    python train_vision.py --dataset cifar100           # ViT-B/16 from ImageNet, one GPU
    python train_vision.py --dataset vtab --protocol vtab1k --weights imagenet21k   # the paper's
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from tqdm import tqdm

import checkpoints
import data as data_sets
import models
import plot
import sprites
import tuning

WEIGHTS = Path(__file__).parent / "weights"
# [us] the grids of --compare; the first is a single run's default
LEARNING_RATES = {
    "linear": (1e-3, 1e-2, 1e-1),
    "bias": (1e-3, 5e-3, 2e-2),
    "vpt": (1e-3, 5e-3, 2e-2),
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (5e-4, 2e-3, 8e-3),
    "ssf": (1e-3, 5e-3, 2e-2),
    "san": (1e-3, 5e-3, 2e-2),
}
# the flags of --ablation's variants
SAN = {"mode": "both", "shift": True, "norms": True, "gamma_std": 0.0, "wiring": "exact"}
VARIANTS = {
    "both, shift (SAN)": SAN,
    "both": SAN | {"shift": False},
    "feature, shift": SAN | {"mode": "feature"},
    "feature": SAN | {"mode": "feature", "shift": False},
    "propagation, shift": SAN | {"mode": "propagation"},
    "propagation": SAN | {"mode": "propagation", "shift": False},
    "SAN, norms frozen": SAN | {"norms": False},
    "SAN, γ from N(1, 0.02)": SAN | {"gamma_std": 0.02},
    "SAN, authors' wiring": SAN | {"wiring": "authors"},
}
FOR_VIT = ("vpt", "SAN, authors' wiring")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in from data set and method."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = p.add_argument
    names = ", ".join(["sprites", *data_sets.TORCHVISION, *data_sets.SUITES])
    add("--dataset", default="sprites", help=f"{names}, or a folder with train/, test/")
    add(
        "--protocol",
        choices=["vtab1k"],
        help="choose on 200 of 1000 labels, train on all; 100 epochs",
    )
    tasks = ["source", *sprites.TASKS, "all"]
    add("--task", default="shape", choices=tasks, help="of sprites; 'all' for tables")
    add("--data-dir", default="data", help="of torchvision's sets, and folders of other tasks")
    add("--shots", type=tuning.positive, help="labelled pictures in all, a fifth for validation")
    add("--model", nargs="+", choices=list(models.SIZES), help="several with --compare")
    add("--weights", help="imagenet1k, imagenet21k, none or a file; by default what suits the set")
    add("--shift", default=True, action=argparse.BooleanOptionalAction, help="train β in SAN")
    add("--wiring", default="exact", choices=["exact", "authors"], help="authors: ViT alone")
    add("--image-size", type=tuning.positive, help="by default what the model is made for")
    add("--workers", type=int, help="processes that load pictures")
    add("--prompts", type=tuning.positive, default=10, help="of vpt, before every block")
    add("--ablation", action="store_true", help="SAN's variants compared, as --compare does")
    add("--compile", action="store_true", help="torch.compile what is trained")
    add("--table", nargs="+", metavar="RUN", help="comparisons' results.jsonl as Markdown tables")
    add("--plot", nargs="+", metavar="RUN", help="pictures of runs and comparisons, into --out")
    tuning.add_flags(p, list(LEARNING_RATES), epochs=None, batch=32)
    args = p.parse_args(words)
    drawn = args.dataset == "sprites"
    args.protocol = args.protocol or ("vtab1k" if args.dataset == "vtab" else None)
    args.epochs = args.epochs or (100 if args.protocol else 20)  # 100: [P, S]
    args.model = args.model or ["vit_micro" if drawn else "vit_b16"]
    if args.ablation and (args.compare or args.protocol or args.method != "san"):
        p.error("--ablation compares SAN's variants, without --compare, --protocol or --method")
    if args.protocol and args.shots:
        p.error("--protocol vtab1k says how many pictures are labelled; leave --shots out")
    if not tabulates(args) and (len(args.model) > 1 or args.task == "all"):
        p.error("several models or tasks at once go with --compare, --ablation or --protocol")
    tuning.check_flags(p, args, tabulates(args))
    if args.workers is None:
        args.workers = 0 if drawn else min(8, torch.get_num_threads())
    return args


def tabulates(args: argparse.Namespace) -> bool:
    """Is a table of many runs asked for, with learning rates searched, rather than one run?"""
    return bool(args.compare or args.ablation or args.protocol or args.dataset in data_sets.SUITES)


def main() -> None:
    args = arguments()
    if args.table or args.plot:
        work = print_tables if args.table else draw
    else:
        work = evaluate_run if args.evaluate else compare if tabulates(args) else run
    tuning.guard(work, args)


# --------------------------------------------------------------------------- model, loss, scores


def load_data(args: argparse.Namespace, task: str, model: str) -> data_sets.Data:
    size = args.image_size or models.SIZES[model][1]
    if args.dataset == "sprites" and size != sprites.PIXELS:
        raise ValueError(
            f"sprites are {sprites.PIXELS} px, and {model} reads {size}; take a micro model, "
            "without --image-size"
        )
    shots = 1000 if args.protocol else args.shots
    data = data_sets.load(args.dataset, task, args.data_dir, size, shots)
    return (data_sets.unaugmented(data) if args.protocol else data).to(args.device)


def load_model(args: argparse.Namespace, name: str, factors: list[int]) -> nn.Module:
    """The base model with its weights and a new head with one output a class of every factor."""
    torch.manual_seed(args.seed)  # the head's first values
    model = models.build(name, sum(factors), args.image_size)
    weights = args.weights or (
        WEIGHTS / f"{name}.pt" if args.dataset == "sprites" else "imagenet1k"
    )
    if weights == "none":
        return model
    state = checkpoints.backbone_state(weights, name)
    try:
        checkpoints.load_backbone(model, state)
    except ValueError as error:
        raise ValueError(f"--weights {weights} do not fit {name}: {error}") from error
    return model


def loader(pictures: Dataset, args: argparse.Namespace, shuffle: bool = False) -> DataLoader:
    """Batches, of what is `Resident` on its device already; larger where nothing is trained."""
    batch = args.batch_size if shuffle else max(256, args.batch_size)
    if isinstance(pictures, data_sets.Resident):
        order = RandomSampler(pictures) if shuffle else SequentialSampler(pictures)
        sampler = BatchSampler(order, batch, drop_last=False)
        return DataLoader(pictures, sampler=sampler, batch_size=None)
    workers = 0 if isinstance(pictures, TensorDataset) else args.workers
    return DataLoader(
        pictures,
        batch_size=batch,
        shuffle=shuffle,
        num_workers=workers,
        pin_memory=args.device.type == "cuda",
    )


def prepare(inputs: Tensor, device: torch.device) -> Tensor:
    """Bytes become normalised pictures on the device; features only move there."""
    inputs = inputs.to(device, non_blocking=True)
    return data_sets.to_input(inputs) if inputs.dtype == torch.uint8 else inputs


def factor_loss(outputs: Tensor, labels: Tensor, factors: list[int]) -> Tensor:
    """Cross-entropy, summed over factors. outputs: B×Σclasses, labels: B×factors."""
    parts = outputs.split(factors, dim=1)
    return sum(F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts))


def factor_accuracy(outputs: Tensor, labels: Tensor, factors: list[int]) -> list[float]:
    """Share of right answers, 0 … 1, for each factor."""
    parts = outputs.split(factors, dim=1)
    hits = [(part.argmax(1) == labels[:, i]) for i, part in enumerate(parts)]
    return [hit.float().mean().item() for hit in hits]


@torch.no_grad()
def outputs_of(function, pictures: Dataset, args, note: str = "") -> tuple[Tensor, Tensor]:
    """(function(picture), label) of a whole split, on the CPU; in float32, so that it repeats."""
    results = []
    for inputs, labels in tqdm(loader(pictures, args), desc=note or "scoring", leave=False):
        results.append((function(prepare(inputs, args.device)).float(), labels))
    outputs, labels = zip(*results)
    return torch.cat(outputs).cpu(), torch.cat(labels).cpu()


def score(model: nn.Module, pictures: Dataset, factors: list[int], args) -> float:
    """Accuracy, 0 … 1, averaged over the factors."""
    model.eval()
    accuracies = factor_accuracy(*outputs_of(model, pictures, args), factors)
    return sum(accuracies) / len(accuracies)


# ------------------------------------------------------------------------------------- one run


def probe(model: nn.Module, data: data_sets.Data, args, note: str) -> tuple[nn.Module, list[dict]]:
    """A linear head on the frozen base: features are computed once, the head trained on them."""
    model.eval()
    splits = [
        split and TensorDataset(*outputs_of(model.features, split, args, "features"))
        for split in (data.plain, data.val)
    ]
    head = copy.deepcopy(model.head).requires_grad_(True)
    args = argparse.Namespace(**vars(args) | {"amp": False, "compile": False, "resume": False})
    history = train(head, splits[0], splits[1], data.factors, args, None, note)
    return head, history


def train(model, train_split, val_split, factors, args, out, note) -> list[dict]:
    """tuning.fit on pictures, or on their features; without a val_split nothing is validated."""

    if args.compile:
        torch.compiler.reset()  # it gives up on a class of which it has compiled several models
    forward = torch.compile(model) if args.compile else model

    def loss_of(_, batch: tuple) -> Tensor:
        inputs, labels = batch
        labels = labels.to(args.device, non_blocking=True)
        return factor_loss(forward(prepare(inputs, args.device)).float(), labels, factors)

    def validate(model: nn.Module) -> float:
        return score(model, val_split, factors, args)

    batches, validate = loader(train_split, args, True), validate if val_split else None
    return tuning.fit(model, batches, loss_of, validate, args, out, note)


def adapted_model(args, name: str, factors: list[int]) -> nn.Module:
    """A base model made ready for args.method, on the device. Raises as load_model and attach."""
    model = load_model(args, name, factors)
    tuning.adapt(model, args.method, args)
    return on_device(model, args.device)


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model there, on a GPU with channels last in a convolution's weight, as it wants them."""
    cuda = device.type == "cuda"
    return model.to(device, memory_format=torch.channels_last if cuda else torch.preserve_format)


def train_method(model: nn.Module, data: data_sets.Data, args, out: Path | None, note: str):
    """Train an adapted model in place, as args say: tuning.train_and_measure's pair."""

    def work() -> list[dict]:
        if args.method == "linear":
            model.head, history = probe(model, data, args, note)
            return history
        return train(model, data.train, data.val, data.factors, args, out, note)

    return tuning.train_and_measure(model, args, note, work)


def read_test(model: nn.Module, data: data_sets.Data, args) -> tuple[Tensor, dict]:
    """Outputs on the test split, and accuracies, 0 … 1: each factor's and their mean."""
    model.eval()
    outputs, labels = outputs_of(model, data.test, args, "test")
    accuracies = factor_accuracy(outputs, labels, data.factors)
    return outputs, {"test": sum(accuracies) / len(accuracies), "factors": accuracies}


def run(args: argparse.Namespace) -> None:
    """One method on one data set: train, score, merge, check and save."""
    name = args.model[0]
    args.lr = args.lr or LEARNING_RATES[args.method][0]
    set_name = name_of(args, args.task)
    args.out = args.out or f"runs/{set_name}-{name}-{args.method}-seed{args.seed}"
    out = Path(args.out)
    data = load_data(args, args.task, name)
    base = load_model(args, name, data.factors)
    model = copy.deepcopy(base)
    tuning.adapt(model, args.method, args)  # all that can be refused is, before writing
    base, model = on_device(base, args.device), on_device(model, args.device)
    print(
        f"{set_name}: {len(data.train)} training, {len(data.val)} validation and "
        f"{len(data.test)} test pictures, {sum(data.factors)} classes"
    )
    tuning.begin(args, out)
    started = time.perf_counter()
    result = {"dataset": set_name, "model": name, "method": args.method, "seed": args.seed}
    if args.weights != "none" and args.method != "linear":
        linear = argparse.Namespace(**vars(args) | {"lr": LEARNING_RATES["linear"][0]})
        base.head, _ = probe(base, data, linear, "linear head")
        result["test_linear"] = score(base, data.test, data.factors, args)
    del base
    history, figures = train_method(model, data, args, out, args.method)
    result |= figures | {"wall": time.perf_counter() - started}
    content = {"model": name, "factors": data.factors, "image_size": model.image_size}
    tuning.conclude(
        model, args, history, result, lambda model: read_test(model, data, args), content
    )


def name_of(args: argparse.Namespace, task: str) -> str:
    """How files and tables call a data set: sprites-shape, cifar100 or the folder's name."""
    return f"sprites-{task}" if args.dataset == "sprites" else Path(args.dataset).resolve().name


def evaluate_run(args: argparse.Namespace) -> None:
    """Score the merged (or fully trained) model of a saved run on its test split."""
    saved, (state, factors, size), path = tuning.reopen(
        args, ("device", "workers", "data_dir"), ("state_dict", "factors", "image_size")
    )
    name = saved.model[0]
    data = load_data(saved, saved.task, name)
    model = models.build(name, sum(factors), size)
    if saved.method == "vpt":  # the one method whose merged model is not the base model's kind
        tuning.adapt(model, "vpt", saved)
    checkpoints.load_backbone(model, state, head=True)
    model = on_device(model, args.device)
    print(f"test accuracy of {path}  {100 * score(model, data.test, data.factors, saved):.2f} %")


# --------------------------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    """Methods on tasks and models, learning rates chosen on validation; two tables.

    The methods are args.method, all with --compare, and with --ablation SAN's variants. With
    --protocol, what was validated on is trained on as well once the learning rate is chosen.
    Of several tasks, one whose data cannot be had is left out and said so. Raises OSError if none
    can.
    """
    sets, lacking = tasks_of(args), set()
    methods = VARIANTS if args.ablation else LEARNING_RATES if args.compare else [args.method]
    keys = [
        {"task": task, "model": name, "method": method, "group": group}
        for name in args.model
        for task, (_, group) in sets.items()
        for method in methods
        if models.SIZES[name][0] is models.ViT or method not in FOR_VIT
    ]
    if not keys:
        raise ValueError(f"{args.method} is for a ViT's tokens alone; give --model vit_… with it")
    grids = {method: LEARNING_RATES["san" if args.ablation else method] for method in methods}
    for method, grid in grids.items():
        rates = [args.lr] if args.lr else grid
        print(f"learning rates for {method}: {', '.join(f'{rate:g}' for rate in rates)}")

    @functools.lru_cache(maxsize=1)
    def load(task: str, name: str) -> data_sets.Data:
        own = sets[task][0]
        try:
            data = load_data(own, own.task, name)
        except (OSError, ValueError):
            lacking.add(task)
            raise
        print(f"{task}: {len(data.train)} + {len(data.val)} labelled, {len(data.test)} to test")
        return data

    def work(key: dict, journal: tuning.Journal) -> list[dict]:
        if key["task"] in lacking:
            return []
        try:
            return measure(key, journal)
        except (OSError, ValueError) as error:
            if key["task"] not in lacking or len(lacking) == len(sets):
                raise
            print(f"left out: {key['task']}, {error}")
            return []

    def measure(key: dict, journal: tuning.Journal) -> list[dict]:
        variant = VARIANTS[key["method"]] | {"method": "san"} if args.ablation else {}

        def train_one(own: argparse.Namespace, last: bool) -> tuple[nn.Module, dict]:
            data = load(key["task"], key["model"])
            if last and args.protocol:
                data = data_sets.whole(data)
            own = argparse.Namespace(**vars(own) | variant)
            model = adapted_model(own, key["model"], data.factors)
            note = f"{key['model']} {key['method']} seed {own.seed}"
            return model, train_method(model, data, own, None, note)[1]

        def read(model: nn.Module) -> tuple[Tensor, dict]:
            return read_test(model, load(key["task"], key["model"]), args)

        grid = grids[key["method"]]
        return tuning.search(args, key, grid, train_one, read, journal, again=bool(args.protocol))

    kind = args.protocol or ("ablation" if args.ablation else "compare")
    args.out = args.out or f"runs/{kind}-{name_of(args, args.task)}"
    tuning.compare(args, Path(args.out), keys, work)


def tasks_of(args: argparse.Namespace) -> dict[str, tuple[argparse.Namespace, str | None]]:
    """What the tables call a task → the flags that load it, and the group it is averaged with."""
    names, left_out = [args.dataset], {}
    if args.dataset in data_sets.SUITES:
        names, left_out = data_sets.suite(args.dataset, args.data_dir)
    for name, reason in left_out.items():
        print(
            f"left out: {name}, {reason}; as a folder {Path(args.data_dir) / name}/ it takes part"
        )
    groups = data_sets.SUITES.get(args.dataset, data_sets.VTAB if args.protocol else {})
    tasks = sprites.TASKS if args.dataset == "sprites" and args.task == "all" else [args.task]
    sets = [
        argparse.Namespace(**vars(args) | {"dataset": n, "task": t}) for n in names for t in tasks
    ]
    return {name_of(s, s.task): (s, groups.get(s.dataset, (None,))[0]) for s in sets}


def print_tables(args: argparse.Namespace) -> None:
    """The tables of what --compare, --ablation and --protocol left in args.table."""
    paths = [Path(run) / "results.jsonl" if Path(run).is_dir() else Path(run) for run in args.table]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give a comparison's folder")
    lines = [line for path in paths for line in tuning.read_results(path)]
    print(tuning.tables(lines))


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


if __name__ == "__main__":
    main()
