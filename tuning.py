"""What training scripts share: the methods, the loop, checkpoints, the merge check, the table.

A method is what it trains: `adapt` prepares a model for it, `fold` makes plain layers of it again.
`fit` is the one training loop; an epoch that has ended is on disk and can be resumed from.
[P] the paper, [C] the authors' v1 code, [S] SSF, [us] our choice, as in san.py.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import san

METHODS = ("linear", "full", "lora", "ssf", "san")
# [us] the search's grid; the first is the default, since validation on sprites chose it most often
LEARNING_RATES = {
    "linear": (1e-3, 1e-2, 1e-1),
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (5e-4, 2e-3, 8e-3),
    "ssf": (1e-3, 5e-3, 2e-2),
    "san": (1e-3, 5e-3, 2e-2),
}

# --------------------------------------------------------------------------------------- methods


class LoRALayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d plus a trained update of low rank: W + (α/r) B A.

    B: out×r, zeros at the start; A: r×(all inputs of one output), Kaiming-uniform (Hu et al. 2022).
    A convolution's kernel counts as a matrix, out × in/groups·kh·kw. x and output: as the layer's.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        weight = layer.weight
        self.layer = layer
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):  # two thin products, never the full update
            return self.layer(x) + (x @ self.a.T) @ self.b.T * self.scale
        return self.layer._conv_forward(x, self.layer.weight + self.update(), self.layer.bias)

    def update(self) -> Tensor:
        return ((self.b @ self.a) * self.scale).view_as(self.layer.weight)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        weight = self.layer.weight + self.update()
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        return self.layer


def adapt(model: nn.Module, method: str, args: argparse.Namespace) -> None:
    """Freeze what `method` does not train and add what it does; every method trains the head.

    san, ssf: γ (and β) of the linked layers and the norms [C]; lora: A and B on the same layers;
    linear: nothing else; full: all. ssf is feature scaling alone with a shift [S].
    """
    links = model.links(args.wiring)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    model.requires_grad_(method == "full")
    model.head.requires_grad_(True)
    if method == "san":
        san.attach(model, links, mode=args.mode, shift=args.shift, trainable=[*norms, "head"])
    elif method == "ssf":
        san.attach(model, links, mode="feature", shift=True, trainable=[*norms, "head"])
    elif method == "lora":
        for link in links:
            layer = LoRALayer(model.get_submodule(link.layer), args.rank, alpha=args.rank)
            model.set_submodule(link.layer, layer)


def fold(model: nn.Module) -> None:
    """Make plain layers of whatever `adapt` added; nothing to do for linear and full."""
    if hasattr(model, "_san"):
        san.merge(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALayer):
            model.set_submodule(name, module.merged())


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Name → values of what requires a gradient: all that a checkpoint must hold of the model."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


# -------------------------------------------------------------------------------------- the loop


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU. Raises ValueError for what is not there.

    On CUDA it asks torch for its deterministic kernels: same seed, same machine, same result.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and slow
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here; try --device cpu or leave it out"
        ) from error
    return device


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate: linear from 0 to `peak` over `warmup` steps, then a half cosine back to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def fit(
    model: nn.Module,
    loader: Iterable,
    loss_of: Callable[[nn.Module, tuple], Tensor],
    validate: Callable[[nn.Module], float],
    args: argparse.Namespace,
    out: Path | None = None,
    note: str = "",
) -> list[dict]:
    """Train what requires a gradient with AdamW, a warm-up and a cosine; one record an epoch.

    loss_of(model, batch): the mean loss of a batch; validate(model): accuracy 0 … 1.
    out: folder for checkpoint.pt, written after every epoch, which is then reported in a line;
    args.resume continues from it.
    Every epoch seeds itself from (seed, epoch), so that a resumed run goes the same way.
    Raises FloatingPointError when the loss or a parameter is no longer finite: the checkpoint of
    the epoch before stays. ValueError for a checkpoint made with other settings.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # decay would pull γ to 0 rather than to the 1 it starts at: only matrices shrink [us]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    device = parameters[0].device
    history: list[dict] = []
    checkpoint = out and out / "checkpoint.pt"
    if checkpoint and args.resume:
        history = resume(checkpoint, model, optimizer, args)
    steps, warmup = args.epochs * len(loader), round(args.warmup_epochs * len(loader))
    for epoch in range(len(history), args.epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)
        model.train()
        started, seen, running = time.perf_counter(), 0, torch.zeros((), device=device)
        label = f"{note} epoch {epoch + 1}/{args.epochs}"
        with tqdm(total=len(loader.dataset), desc=label, unit="img", leave=False) as bar:
            for i, batch in enumerate(loader):
                rate = rate_at(epoch * len(loader) + i, steps, warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = loss_of(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                running += loss.detach() * len(batch[0])
                seen += len(batch[0])
                if i % 20 == 0 or i == len(loader) - 1:  # reading the loss makes the device wait
                    require_finite(loss.item(), [], epoch, rate, checkpoint)
                    bar.set_postfix(loss=f"{running.item() / seen:.3f}", lr=f"{rate:.1e}")
                bar.update(len(batch[0]))
        seconds = time.perf_counter() - started
        require_finite(running.item(), parameters, epoch, rate, checkpoint)
        record = {"epoch": epoch + 1, "loss": running.item() / seen, "val": validate(model)}
        history.append(record | {"seconds": seconds, "images_per_second": seen / seconds})
        if checkpoint:
            content = {"settings": settings(args), "history": history}
            content |= {"model": trained_state(model), "optimizer": optimizer.state_dict()}
            san.write(content, checkpoint)
            tqdm.write(
                f"{label}  loss {record['loss']:.3f}  validation {100 * record['val']:.1f} %  "
                f"{seen / seconds:.0f} images/s",
                file=sys.stdout,
            )
    return history


def require_finite(
    loss: float, parameters: list, epoch: int, rate: float, checkpoint: Path | None
) -> None:
    if math.isfinite(loss) and all(p.isfinite().all() for p in parameters):
        return
    kept = f"; epoch {epoch} is kept in {checkpoint}" if checkpoint and epoch else ""
    raise FloatingPointError(
        f"the loss is no longer a finite number in epoch {epoch + 1} at learning rate {rate:.1e}; "
        f"try a smaller --lr{kept}"
    )


def settings(args: argparse.Namespace) -> dict:
    """The settings that decide a run's numbers; where it writes and how it loads do not."""
    free = ("out", "resume", "device", "workers", "data_dir", "evaluate", "compare")
    return {key: value for key, value in vars(args).items() if key not in free}


def require_checkpoint(out: Path) -> None:
    """Raise ValueError if the folder `out` holds nothing to resume from, or a finished run."""
    if any((out / name).is_file() for name in ("merged.pt", "model.pt")):
        raise ValueError(f"the run in {out} is finished; score it with --evaluate {out}")
    if not (out / "checkpoint.pt").is_file():
        raise ValueError(f"there is no checkpoint in {out} to resume; start without --resume")


def resume(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> list[dict]:
    """Put a checkpoint's epoch back into model and optimizer; its history so far is returned.

    Raises ValueError if it was made with other settings, OSError if it is broken.
    """
    content = san.read(checkpoint)
    if not isinstance(content, dict) or not {"settings", "model", "optimizer"} <= content.keys():
        raise OSError(f"{checkpoint} is no checkpoint of a run; remove it and start again")
    old, new = content["settings"], settings(args)
    other = [key for key in new if old.get(key) != new[key]]
    if other:
        key = other[0]
        raise ValueError(
            f"{checkpoint} was made with {key} = {old.get(key)}, not {new[key]}; resume with the "
            "same settings"
        )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in content["model"].items():
            own[name].copy_(value)
    optimizer.load_state_dict(content["optimizer"])
    return content["history"]


def guard(work: Callable[[], None], args: argparse.Namespace) -> None:
    """Do a script's work; what a user can put right ends it with one sentence and an exit code.

    2: ValueError, a usage that makes no sense; 1: OSError, a loss that is not finite, no memory
    left on the device; 130: Ctrl-C, which says what is kept and how to go on.
    """
    script = Path(sys.argv[0]).name
    try:
        work()
    except KeyboardInterrupt:
        words = ["python", *(word for word in sys.argv if word != "--resume")]
        checkpoint = Path(args.out or "") / "checkpoint.pt"
        if args.compare:
            kept = f"every finished method is kept; to go on: {shlex.join(words)}"
        elif args.evaluate or not checkpoint.is_file():
            kept = "nothing was finished yet, start again with the same command"
        else:
            epoch = len(san.read(checkpoint)["history"])
            again = shlex.join([*words, "--resume"])
            kept = f"epoch {epoch} is kept in {checkpoint}; to go on: {again}"
        print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def peak_memory(device: torch.device, start: bool = False) -> float:
    """Peak memory in MB since the call with start=True.

    On CUDA: what torch had allocated. Elsewhere the process's resident memory, as Linux counts it
    and lets us set the count back; nan where there is no such count.
    """
    if device.type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        if start:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1e3
    except (OSError, IndexError):
        return math.nan


# --------------------------------------------------------------------------------------- reports


def compare_outputs(adapted: Tensor, merged: Tensor) -> dict:
    """Do two models' outputs, pictures×classes, agree?

    merge_difference: the largest absolute difference; merge_same: the share of pictures, 0 … 1,
    with the same largest output.
    """
    difference = (adapted - merged).abs().max().item()
    same = (adapted.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return {"merge_difference": difference, "merge_same": same}


def write_text(text: str, path: Path) -> None:
    """Write a small text file whole or not at all. Raises OSError."""
    san.write(text, path, save=lambda content, file: file.write_text(content))


def write_json_lines(records: list[dict], path: Path) -> None:
    write_text("".join(json.dumps(record) + "\n" for record in records), path)


def search(
    args: argparse.Namespace,
    method: str,
    train: Callable[[argparse.Namespace], tuple[nn.Module, dict]],
    finish: Callable[[nn.Module], dict],
) -> dict:
    """Choose one method's learning rate on validation, then train and score it with every seed.

    train(args): a model and its figures, at args.lr and args.seed; finish(model): its test scores.
    Every rate is tried with seed 0; the best by validation is scored on the test split, then the
    other seeds. A rate at which the loss does not stay finite is out, and recorded as None.
    """

    def trained(rate: float, seed: int) -> tuple[nn.Module, dict]:
        own = vars(args) | {"method": method, "lr": rate, "seed": seed}
        model, figures = train(argparse.Namespace(**own))
        model.zero_grad()  # the best is kept while others train: without its gradients
        print(f"  validation {100 * figures['val']:.1f} %", flush=True)
        return model, figures

    best, tried = None, {}
    rates = [args.lr] if args.lr else LEARNING_RATES[method]
    for rate in rates:
        try:
            model, figures = trained(rate, seed=0)
        except FloatingPointError as error:
            tried[f"{rate:g}"] = None
            print(f"  {error}")
            continue
        tried[f"{rate:g}"] = figures["val"]
        if best is None or figures["val"] > best[2]["val"]:
            best = rate, model, figures
    if best is None:
        raise FloatingPointError(f"{method} stayed finite at none of the learning rates {rates}")
    rate, model, figures = best
    results = [figures | finish(model)]
    for seed in range(1, args.seeds):
        model, figures = trained(rate, seed)
        results.append(figures | finish(model))
    return {"lr": rate, "tried": tried, "runs": results}


def table(rows: list[dict]) -> str:
    """One Markdown row for each row of `search`, with its task, model and method."""
    lines = []
    for row in rows:
        runs = row["runs"]
        same = min(run["merge_same"] for run in runs)
        gap = max(run["merge_difference"] for run in runs)
        lines.append(
            {
                "model": row["model"],
                "task": row["task"],
                "method": row["method"],
                "test accuracy, %": spread([run["test"] for run in runs]),
                "trained": f"{runs[0]['trainable']:,} ({runs[0]['percent']:.2f} %)",
                "lr": f"{row['lr']:g}",
                "s/epoch": f"{min(run['seconds'] for run in runs):.2f}",
                "peak MB": f"{max(run['memory'] for run in runs):.0f}",
                "merged = adapted": f"{100 * same:.1f} %, {gap:.0e}",
            }
        )
    return markdown(lines)


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: list[float]) -> str:
    """Per cent, mean ± standard deviation (n − 1) of shares: '54.1 ± 0.8'."""
    tensor = torch.tensor(values, dtype=torch.float64) * 100
    deviation = tensor.std().item() if len(values) > 1 else 0.0
    return f"{tensor.mean().item():.1f} ± {deviation:.1f}"
