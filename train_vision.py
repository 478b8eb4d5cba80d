"""Adapt a pretrained vision backbone with SAN, or with what people use instead, and compare.

Four ways to use it:
    python train_vision.py                              # sprites, shipped weights, two CPU cores
    python train_vision.py --dataset cifar100           # ViT-B/16 from ImageNet, one GPU
    python train_vision.py --compare --task all         # linear, full, LoRA, SSF and SAN
    python train_vision.py --evaluate runs/…            # score a saved run again
"""

import argparse
import copy
import json
import shlex
import sys
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
import tuning

WEIGHTS = Path(__file__).parent / "weights"
IMAGENET = {
    "vit_b16": "ViT_B_16_Weights.IMAGENET1K_V1",
    "vit_l16": "ViT_L_16_Weights.IMAGENET1K_V1",
    "convnext_tiny": "ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
    "convnext_base": "ConvNeXt_Base_Weights.IMAGENET1K_V1",
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The flags, with what they leave open filled in from data set and method."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = p.add_argument
    names = ", ".join(data_sets.TORCHVISION)
    add("--dataset", default="sprites", help=f"sprites, {names}, or a folder with train/, test/")
    tasks = ["source", *data_sets.TASKS, "all"]
    add("--task", default="shape", choices=tasks, help="of sprites; 'all' with --compare")
    add("--data-dir", default="data", help="where torchvision's sets are or go")
    add("--shots", type=positive, help="labelled pictures in all, a fifth for validation")
    add("--model", nargs="+", choices=list(models.SIZES), help="several with --compare")
    add("--weights", help="imagenet1k, none, or a model.pt; by default what suits the data set")
    add("--method", default="san", choices=tuning.METHODS)
    add("--mode", default="both", choices=san.MODES, help="SAN's ablation")
    add("--shift", default=True, action=argparse.BooleanOptionalAction, help="train β in SAN")
    add("--wiring", default="exact", choices=["exact", "authors"], help="authors: ViT alone")
    add("--rank", type=positive, default=8, help="of LoRA")
    add("--epochs", type=positive, default=20)
    add("--batch-size", type=positive, default=32)
    add("--lr", type=float, help="by default what suits the method")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup-epochs", type=float, help="by default a tenth of the epochs")
    add("--image-size", type=positive, help="by default what the model is made for")
    add("--seed", type=int, default=0, choices=range(10_000), metavar="0…9999")
    add("--device", default="auto", help="cpu, cuda, …")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; on where fast")
    add("--workers", type=int, help="processes that load pictures")
    add("--out", help="default: runs/<dataset>-<model>-<method>-seed<k>")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--evaluate", metavar="RUN", help="score a saved run again, train nothing")
    add("--compare", action="store_true", help="all methods, learning rates searched; one table")
    add("--seeds", type=positive, default=3, help="of --compare")
    args = p.parse_args(words)
    sprites = args.dataset == "sprites"
    args.model = args.model or ["vit_micro" if sprites else "vit_b16"]
    if args.compare and (args.resume or args.seed):
        p.error("--compare takes --seeds, the number of them, and goes on by itself")
    if not args.compare and (len(args.model) > 1 or args.task == "all"):
        p.error("several models or tasks at once go with --compare")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        p.error("--lr must be a number above 0")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if not (0 <= args.warmup_epochs <= args.epochs and 0 <= args.weight_decay < float("inf")):
        p.error("--warmup-epochs must lie in 0 … --epochs, and --weight-decay be 0 or more")
    if args.workers is None:
        args.workers = 0 if sprites else min(8, torch.get_num_threads())
    return args


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number above 0")
    return number


def main() -> None:
    args = arguments()

    def work() -> None:
        args.device = tuning.pick_device(args.device)
        if args.amp is None:
            args.amp = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
        if args.evaluate:
            evaluate_run(args)
        elif args.compare:
            compare(args)
        else:
            run(args)

    tuning.guard(work, args)


# --------------------------------------------------------------------------- model, loss, scores


def load_data(args: argparse.Namespace, task: str, model: str) -> data_sets.Data:
    size = args.image_size or models.SIZES[model][1]
    if args.dataset == "sprites" and size != data_sets.PIXELS:
        raise ValueError(f"sprites are {data_sets.PIXELS} px; take a micro model, not {model}")
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
    """Train an adapted model in place, as args.method and args.lr say.

    Returns its history (one record an epoch) and figures: trainable (count), percent of all,
    seconds an epoch, peak memory in MB, and val, the last validation accuracy, 0 … 1.
    """
    tuning.peak_memory(args.device, start=True)
    trainable, total = tuning.count(model)
    percent = 100 * trainable / total
    print(
        f"{note}: trains {trainable:,} of {total:,} parameters, {percent:.2f} %, at lr {args.lr:g}"
    )
    if args.method == "linear":
        model.head, history = probe(model, data, args, note)
    else:
        history = train(model, data.train, data.val, data.factors, args, out, note)
    figures = {
        "trainable": trainable,
        "percent": percent,
        "seconds": sum(record["seconds"] for record in history) / len(history),
        "memory": tuning.peak_memory(args.device),
        "val": history[-1]["val"],
    }
    return history, figures


def finish(model: nn.Module, data: data_sets.Data, args) -> dict:
    """Score the adapted model on the test split, merge it in place, and score it again.

    Returns test and test_merged (accuracy, 0 … 1, the mean over factors), each factor's, and
    what tuning.compare_outputs says.
    """
    model.eval()
    adapted, labels = outputs_of(model, data.test, args, "test, adapted")
    tuning.fold(model)
    merged, _ = outputs_of(model, data.test, args, "test, merged")
    accuracies = factor_accuracy(adapted, labels, data.factors)
    result = {
        "test": sum(accuracies) / len(accuracies),
        "test_merged": sum(factor_accuracy(merged, labels, data.factors)) / len(accuracies),
        "factors": accuracies,
    }
    return result | tuning.compare_outputs(adapted, merged)


def run(args: argparse.Namespace) -> None:
    """One method on one data set: train, score, merge, check and save."""
    name = args.model[0]
    args.lr = args.lr or tuning.LEARNING_RATES[args.method][0]
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
    if args.resume:
        tuning.require_checkpoint(out)
    else:
        names = ("adapter.pt", "merged.pt", "model.pt", "metrics.jsonl", "checkpoint.pt")
        files = [out / name for name in names if (out / name).exists()]
        if files and not (out / "config.json").exists():
            raise ValueError(
                f"{files[0]} is not from a run and would be lost; choose another --out"
            )
        config = {k: str(v) if k == "device" else v for k, v in vars(args).items()}
        tuning.write_text(json.dumps(config, indent=1) + "\n", out / "config.json")
        for old in files:
            old.unlink(missing_ok=True)

    started = time.perf_counter()
    result = {"dataset": set_name, "model": name, "method": args.method, "seed": args.seed}
    if args.weights != "none" and args.method != "linear":
        linear = argparse.Namespace(**vars(args) | {"lr": tuning.LEARNING_RATES["linear"][0]})
        base.head, _ = probe(base, data, linear, "linear head")
        result["test_linear"] = score(base, data.test, data.factors, args)
    del base
    history, figures = train_method(model, data, args, out, args.method)
    result |= figures | {"wall": time.perf_counter() - started}
    if args.method in ("san", "ssf"):
        san.save_adapter(model, out / "adapter.pt")
        result["gamma"] = san.summary(model)["layers"]
    elif args.method != "full":
        san.write({"trained": tuning.trained_state(model)}, out / "adapter.pt")
    result |= finish(model, data, args)
    content = {"model": name, "factors": data.factors, "image_size": model.image_size}
    saved = out / ("model.pt" if args.method == "full" else "merged.pt")
    san.write(content | {"state_dict": model.state_dict()}, saved)
    tuning.write_json_lines([*history, result], out / "metrics.jsonl")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    report(result, saved)


def name_of(args: argparse.Namespace, task: str) -> str:
    """How files and tables call a data set: sprites-shape, cifar100 or the folder's name."""
    return f"sprites-{task}" if args.dataset == "sprites" else Path(args.dataset).resolve().name


def report(result: dict, saved: Path) -> None:
    if "test_linear" in result:
        print(f"test accuracy, base + linear head  {100 * result['test_linear']:.2f} %")
    print(f"test accuracy, {result['method']:<20}{100 * result['test']:.2f} %")
    if len(result["factors"]) > 1:
        print("each factor:", ", ".join(f"{100 * share:.1f} %" for share in result["factors"]))
    print(
        f"test accuracy, merged              {100 * result['test_merged']:.2f} %   largest output "
        f"difference {result['merge_difference']:.1e}, "
        f"{100 * result['merge_same']:.1f} % of the predictions the same"
    )
    if layers := result.get("gamma", {}).values():
        up, down = (
            sum(g[key] for g in layers) / len(layers) for key in ("potentiated", "depressed")
        )
        low, high = min(g["min"] for g in layers), max(g["max"] for g in layers)
        print(
            f"γ: a layer has {100 * up:.0f} % of its channels potentiated and {100 * down:.0f} % "
            f"depressed on average; from {low:.2f} to {high:.2f}"
        )
    print(
        f"saved {saved} and, beside it, {', '.join(sorted(p.name for p in saved.parent.iterdir()))}"
    )


def evaluate_run(args: argparse.Namespace) -> None:
    """Score the merged (or fully trained) model of a saved run on its test split."""
    folder = Path(args.evaluate)
    try:
        config = json.loads((folder / "config.json").read_text())
        own = {key: getattr(args, key) for key in ("device", "workers", "data_dir")}
        saved = argparse.Namespace(**config | own)
        name = saved.model[0]
        path = folder / ("model.pt" if saved.method == "full" else "merged.pt")
        content = san.read(path)
        state, factors, size = (content[key] for key in ("state_dict", "factors", "image_size"))
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        raise OSError(f"{folder} is no finished run that can be scored: {error}") from error
    data = load_data(saved, saved.task, name)
    model = models.build(name, sum(factors), size)
    models.load_backbone(model, state, head=True)
    model.to(args.device)
    print(f"test accuracy of {path}  {100 * score(model, data.test, data.factors, saved):.2f} %")


# --------------------------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    """Every method on every task and model, learning rates chosen on validation; one table.

    The search trains with seed 0 at each rate of the method's grid; the best by validation is
    scored on the test split, and again with the other seeds. What is done is kept in
    results.jsonl and not done again by the same command.
    """
    sprites = args.dataset == "sprites"
    tasks = data_sets.TASKS if sprites and args.task == "all" else [args.task]
    out = Path(args.out or f"runs/compare-{name_of(args, args.task)}")
    path, done = out / "results.jsonl", []
    if path.exists():
        try:
            done = [json.loads(line) for line in path.read_text().splitlines()]
            done = [row for row in done if row["options"] and row["runs"]]
        except (ValueError, TypeError, KeyError) as error:
            raise OSError(f"{path} is broken; move it away and start again") from error
    options = tuning.settings(args) | {"task": None, "model": None, "method": None}
    for name in args.model:
        for task in tasks:
            data = load_data(args, task, name)
            for method in tuning.METHODS:
                key = {"task": name_of(args, task), "model": name, "method": method}
                if any(row["options"] == options and key.items() <= row.items() for row in done):
                    continue
                row = compare_one(args, data, name, method)
                done.append(key | row | {"options": options})
                tuning.write_json_lines(done, path)
    rows = [row for row in done if row["options"] == options]
    command = shlex.join(["python", "train_vision.py", *sys.argv[1:]])
    text = f"`{command}`\n\n{tuning.table(rows)}"
    tuning.write_text(text, out / "table.md")
    print(f"\n{text}\nsaved {out / 'table.md'}")


def compare_one(args, data: data_sets.Data, name: str, method: str) -> dict:
    """tuning.search for one method, with this script's model, training and scores."""

    def train_one(own: argparse.Namespace) -> tuple[nn.Module, dict]:
        model = adapted_model(own, name, data.factors)
        note = f"{name} {own.method} seed {own.seed}"
        return model, train_method(model, data, own, None, note)[1]

    return tuning.search(args, method, train_one, lambda model: finish(model, data, args))


if __name__ == "__main__":
    main()
