"""Adapt a pretrained vision backbone with SAN, or with what people use instead, and compare.

Four ways to use it:
    python train_vision.py                              # sprites, shipped weights, two CPU cores
    python train_vision.py --dataset cifar100           # ViT-B/16 from ImageNet, one GPU
    python train_vision.py --compare --task all         # linear, full, LoRA, SSF and SAN
    python train_vision.py --evaluate runs/…            # score a saved run again
"""

import argparse
import copy
import functools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

import data as data_sets
import models
import san
import sprites
import tuning

WEIGHTS = Path(__file__).parent / "weights"
# [us] the grids of --compare; the first is the default, since validation on sprites chose it most
LEARNING_RATES = {
    "linear": (1e-3, 1e-2, 1e-1),
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (5e-4, 2e-3, 8e-3),
    "ssf": (1e-3, 5e-3, 2e-2),
    "san": (1e-3, 5e-3, 2e-2),
}
IMAGENET = {
    "vit_b16": "ViT_B_16_Weights.IMAGENET1K_V1",
    "vit_l16": "ViT_L_16_Weights.IMAGENET1K_V1",
    "convnext_tiny": "ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
    "convnext_base": "ConvNeXt_Base_Weights.IMAGENET1K_V1",
    "swin_tiny": "Swin_T_Weights.IMAGENET1K_V1",
    "swin_base": "Swin_B_Weights.IMAGENET1K_V1",
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in from data set and method."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = p.add_argument
    names = ", ".join(data_sets.TORCHVISION)
    add("--dataset", default="sprites", help=f"sprites, {names}, or a folder with train/, test/")
    tasks = ["source", *sprites.TASKS, "all"]
    add("--task", default="shape", choices=tasks, help="of sprites; 'all' with --compare")
    add("--data-dir", default="data", help="where torchvision's sets are or go")
    add("--shots", type=tuning.positive, help="labelled pictures in all, a fifth for validation")
    add("--model", nargs="+", choices=list(models.SIZES), help="several with --compare")
    add("--weights", help="imagenet1k, none, or a model.pt; by default what suits the data set")
    add("--shift", default=True, action=argparse.BooleanOptionalAction, help="train β in SAN")
    add("--wiring", default="exact", choices=["exact", "authors"], help="authors: ViT alone")
    add("--image-size", type=tuning.positive, help="by default what the model is made for")
    add("--workers", type=int, help="processes that load pictures")
    tuning.add_flags(p, list(LEARNING_RATES), epochs=20, batch=32)
    args = p.parse_args(words)
    drawn = args.dataset == "sprites"
    args.model = args.model or ["vit_micro" if drawn else "vit_b16"]
    if not args.compare and (len(args.model) > 1 or args.task == "all"):
        p.error("several models or tasks at once go with --compare")
    tuning.check_flags(p, args)
    if args.workers is None:
        args.workers = 0 if drawn else min(8, torch.get_num_threads())
    return args


def main() -> None:
    args = arguments()
    work = evaluate_run if args.evaluate else compare if args.compare else run
    tuning.guard(work, args)


# --------------------------------------------------------------------------- model, loss, scores


def load_data(args: argparse.Namespace, task: str, model: str) -> data_sets.Data:
    size = args.image_size or models.SIZES[model][1]
    if args.dataset == "sprites" and size != sprites.PIXELS:
        raise ValueError(f"sprites are {sprites.PIXELS} px; take a micro model, not {model}")
    return data_sets.load(args.dataset, task, args.data_dir, size, args.shots)


def load_model(args: argparse.Namespace, name: str, factors: list[int]) -> nn.Module:
    """The base model with its weights and a new head with one output a class of every factor."""
    torch.manual_seed(args.seed)  # the head's first values
    model = models.build(name, sum(factors), args.image_size)
    weights = args.weights or (
        WEIGHTS / f"{name}.pt" if args.dataset == "sprites" else "imagenet1k"
    )
    if weights == "none":
        return model
    if not args.weights and weights != "imagenet1k" and not weights.exists():
        raise ValueError(
            f"no weights are shipped for {name}; pre-train it as weights/README.md says and give "
            "--weights PATH, or give none"
        )
    if weights == "imagenet1k":
        state = models.from_torchvision(imagenet1k(name))
    else:
        content = san.read(weights)
        state = content.get("state_dict", content) if isinstance(content, dict) else {}
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{weights} holds no state dict of a model")
        if "conv_proj.weight" in state or "features.0.0.weight" in state:
            state = models.from_torchvision(state)
    try:
        models.load_backbone(model, state)
    except ValueError as error:
        raise ValueError(f"--weights {weights} do not fit {name}: {error}") from error
    return model


def imagenet1k(name: str) -> dict[str, Tensor]:
    if name not in IMAGENET:
        raise ValueError(
            f"there are no imagenet1k weights for {name}; take one of {', '.join(IMAGENET)}, "
            "or give --weights PATH or none"
        )
    weights = torchvision.models.get_weight(IMAGENET[name])
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"could not download the imagenet1k weights of {name} ({error}); where there is no "
            f"network, fetch {weights.url} and put it in {folder}"
        ) from error


def loader(pictures: Dataset, args: argparse.Namespace, shuffle: bool = False) -> DataLoader:
    return DataLoader(
        pictures,
        batch_size=args.batch_size if shuffle else max(256, args.batch_size),
        shuffle=shuffle,
        num_workers=0 if isinstance(pictures, TensorDataset) else args.workers,
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
        results.append((function(prepare(inputs, args.device)).float().cpu(), labels))
    outputs, labels = zip(*results)
    return torch.cat(outputs), torch.cat(labels)


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
        TensorDataset(*outputs_of(model.features, split, args, "features"))
        for split in (data.plain, data.val)
    ]
    head = copy.deepcopy(model.head).requires_grad_(True)
    args = argparse.Namespace(**vars(args) | {"amp": False, "resume": False})
    history = train(head, splits[0], splits[1], data.factors, args, None, note)
    return head, history


def train(model, train_split, val_split, factors, args, out, note) -> list[dict]:
    def loss_of(model: nn.Module, batch: tuple) -> Tensor:
        inputs, labels = batch
        labels = labels.to(args.device, non_blocking=True)
        return factor_loss(model(prepare(inputs, args.device)).float(), labels, factors)

    def validate(model: nn.Module) -> float:
        return score(model, val_split, factors, args)

    return tuning.fit(model, loader(train_split, args, True), loss_of, validate, args, out, note)


def adapted_model(args, name: str, factors: list[int]) -> nn.Module:
    """A base model made ready for args.method, on the device. Raises as load_model and attach."""
    model = load_model(args, name, factors)
    tuning.adapt(model, args.method, args)
    return model.to(args.device)


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
    base, model = base.to(args.device), model.to(args.device)
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
    models.load_backbone(model, state, head=True)
    model.to(args.device)
    print(f"test accuracy of {path}  {100 * score(model, data.test, data.factors, saved):.2f} %")


# --------------------------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    """Every method on every task and model, learning rates chosen on validation; one table.

    The search trains with seed 0 at each rate of the method's grid; the best by validation is
    scored on the test split, and again with the other seeds.
    """
    tasks = [args.task]
    if args.task == "all" and args.dataset == "sprites":
        tasks = sprites.TASKS
    task_of = {name_of(args, task): task for task in tasks}
    keys = [
        {"task": task, "model": name, "method": method}
        for name in args.model
        for task in task_of
        for method in LEARNING_RATES
    ]

    @functools.lru_cache(maxsize=1)
    def load(task: str, name: str) -> data_sets.Data:
        return load_data(args, task_of[task], name)

    def row_of(key: dict) -> dict:
        data = load(key["task"], key["model"])
        return compare_one(args, data, key["model"], key["method"])

    tuning.compare(args, Path(args.out or f"runs/compare-{name_of(args, args.task)}"), keys, row_of)


def compare_one(args, data: data_sets.Data, name: str, method: str) -> dict:
    """tuning.search for one method, with this script's model, training and scores."""

    def train_one(own: argparse.Namespace) -> tuple[nn.Module, dict]:
        model = adapted_model(own, name, data.factors)
        note = f"{name} {own.method} seed {own.seed}"
        return model, train_method(model, data, own, None, note)[1]

    return tuning.search(
        args, method, LEARNING_RATES[method], train_one, lambda model: read_test(model, data, args)
    )


if __name__ == "__main__":
    main()
