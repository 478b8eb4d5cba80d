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
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
import san

# --------------------------------------------------------------------------------------- methods


class LoRALayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d plus a trained update of low rank: W + (α/r) B A.

    B: out×r, zeros at the start; A: r×(all inputs of one output), Kaiming-uniform (Hu et al. 2022).
    A convolution's kernel counts as a matrix, out × in/groups·kh·kw. x and output: as the layer's.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        weight = layer.weight
        # float32 at least, as γ: steps would be lost to half precision's rounding
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.layer = layer
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight[0].numel(), dtype=wide))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank, dtype=wide))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + self.low_rank(x)
        weight = self.weight_now().to(self.layer.weight.dtype)
        return self.layer._conv_forward(x, weight, self.layer.bias)

    def low_rank(self, x: Tensor) -> Tensor:
        """(α/r) B A x by two thin products, never the full update."""
        return ((x.to(self.a.dtype) @ self.a.T) @ self.b.T * self.scale).to(x.dtype)

    def update(self) -> Tensor:
        """(α/r) B A in the weight's shape."""
        return ((self.b @ self.a) * self.scale).view_as(self.layer.weight)

    def weight_now(self) -> Tensor:
        """What the layer's weight will be after the merge, before rounding."""
        return self.layer.weight + self.update()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself, now with the updated weight, rounded to its own type once."""
        weight = self.weight_now().to(self.layer.weight.dtype)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        return self.layer


class DoRALayer(LoRALayer):
    """A frozen nn.Linear with a trained size and direction: m ⊙ V / ‖V‖, V = W + (α/r) B A.

    m: out, one size a row, ‖W‖ at the start; ‖·‖: each row's length, which the gradient takes for
    a constant, as its authors do (Liu et al. 2024).
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer, rank, alpha)
        self.m = nn.Parameter(layer.weight.to(self.a.dtype).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.layer.weight) + self.low_rank(x)
        z = (z * self.ratio()).to(x.dtype)
        return z if self.layer.bias is None else z + self.layer.bias

    def ratio(self) -> Tensor:
        """m / ‖V‖, one entry a row."""
        with torch.no_grad():
            length = super().weight_now().norm(dim=1)
        return self.m / length

    def weight_now(self) -> Tensor:
        return self.ratio()[:, None] * super().weight_now()


class PromptedBlock(nn.Module):
    """A frozen ViT block that reads p trained tokens beside the picture's: VPT-deep.

    x: B×N×C, the class token first; the prompts, p×C, stand after it, and in place of those of the
    block before. Their first values are uniform, Xavier's for a patch (Jia et al. 2022). A prompt
    cannot be merged: the adapted model stays slower than its base.
    """

    def __init__(self, block: nn.Module, prompts: int, patch: nn.Conv2d, first: bool):
        super().__init__()
        self.block = block
        self.prompts = nn.Parameter(patch.weight.new_empty(prompts, len(patch.weight)))
        self.first = first
        bound = math.sqrt(6 / (patch.weight[0].numel() + len(patch.weight)))
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, 1 if self.first else 1 + len(self.prompts) :]
        return self.block(torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), patches], 1))


def adapt(model: nn.Module, method: str, args: argparse.Namespace) -> None:
    """Freeze what `method` does not train and add what it does.

    linear: the head, and a LLaMA's last norm (where head and embedding are one matrix, that);
    bias: the biases; full: all; vpt: args.prompts tokens before every block of a ViT;
    san, ssf: γ (and β) of the linked layers and, with args.norms, the norms [C], ssf being feature
    scaling alone with a shift [S]; γ start at 1, SAN's with args.gamma_std around it, as SSF's own
    code has them (0.02) [S]; lora, dora: an update of low rank on the linked layers, of a
    LLaMA on its LOW_RANK layers; san+lora, san+dora [P]: that update inside SAN's two diagonals,
    which act on the updated weight [us]. The rank is args.rank and α equals it [us]. dora and the
    last two are for nn.Linear alone.
    A classifier's new head is trained by every method; a LLaMA's head is pre-trained, as the rest.
    Raises ValueError for vpt on another model than a ViT.
    """
    links = model.links(args.wiring)
    is_llama = isinstance(model, models.LLaMA)
    norm_types = (nn.LayerNorm, models.RMSNorm)
    norms = [name for name, m in model.named_modules() if isinstance(m, norm_types) and args.norms]
    head = [] if is_llama else ["head"]
    model.requires_grad_(method == "full")
    for name in ("norm", "head") if is_llama and method == "linear" else head:
        model.get_submodule(name).requires_grad_(True)
    if method.startswith("san"):
        san.attach(model, links, mode=args.mode, shift=args.shift, trainable=[*norms, *head])
        for layer in model.modules():
            if isinstance(layer, san.SANLayer) and layer.gamma is not None:
                nn.init.normal_(layer.gamma, 1.0, args.gamma_std)
    elif method == "ssf":
        san.attach(model, links, mode="feature", shift=True, trainable=[*norms, *head])
    elif method == "bias":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias") or parameter.requires_grad)
    elif method == "vpt":
        if not isinstance(model, models.ViT):
            raise ValueError(f"vpt prompts a ViT's tokens, and this is a {type(model).__name__}")
        for i, block in enumerate(model.blocks):
            model.blocks[i] = PromptedBlock(block, args.prompts, model.patch_embed, i == 0)
    kind = method.removeprefix("san+")
    if kind in ("lora", "dora"):
        layer_type = LoRALayer if kind == "lora" else DoRALayer
        for name in (link.layer for link in links):
            if not is_llama or name.endswith(models.LLaMA.LOW_RANK):
                inner = f"{name}.layer" if kind != method else name  # inside the SAN layer
                layer = layer_type(model.get_submodule(inner), args.rank, alpha=args.rank)
                model.set_submodule(inner, layer)


def fold(model: nn.Module) -> None:
    """Make plain layers of whatever `adapt` added, but for vpt's prompts, which stay."""
    for name, module in list(model.named_modules()):  # updates first: they are inside SAN layers
        if isinstance(module, LoRALayer):
            model.set_submodule(name, module.merged())
    if hasattr(model, "_san"):
        san.merge(model)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Name → values of what requires a gradient: all that a checkpoint must hold of the model."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


# ----------------------------------------------------------------------------------------- flags


def add_flags(p: argparse.ArgumentParser, methods: Iterable[str], epochs: int, batch: int) -> None:
    """The flags that every training script has."""
    add, yes_no = p.add_argument, argparse.BooleanOptionalAction
    add("--method", default="san", choices=methods)
    add("--mode", default="both", choices=san.MODES, help="SAN's ablation")
    add("--norms", default=True, action=yes_no, help="train the norms with san and ssf")
    add("--gamma-std", type=float, default=0.0, help="SAN's γ start at 1 ± this")
    add("--rank", type=positive, default=8, help="of LoRA and DoRA")
    add("--epochs", type=positive, default=epochs)
    add("--batch-size", type=positive, default=batch)
    add("--lr", type=float, help="by default what suits the method")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup-epochs", type=float, help="by default a tenth of the epochs")
    add("--seed", type=int, default=0, help="0 … 9999")
    add("--device", default="auto", help="cpu, cuda, …")
    add("--amp", action=yes_no, help="bfloat16 autocast; by default on a GPU that has it")
    add("--out", help="default: runs/<data>-<model>-<method>-seed<k>")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--evaluate", metavar="RUN", help="score a saved run again, train nothing")
    add("--compare", action="store_true", help="all methods, learning rates searched; one table")
    add("--seeds", type=positive, default=3, help="how many, where tables are made")


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace, many: bool) -> None:
    """Fill in what add_flags leaves open; a combination without a sense ends the program.

    many: whether the flags ask for a table of runs rather than one.
    """
    if many and (args.resume or args.seed):
        p.error("a comparison takes --seeds, the number of them, and goes on by itself")
    if not 0 <= args.seed < 10_000:
        p.error("--seed must lie in 0 … 9999")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        p.error("--lr must be a number above 0")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    if not (0 <= args.warmup_epochs <= args.epochs and 0 <= args.weight_decay < float("inf")):
        p.error("--warmup-epochs must lie in 0 … --epochs, and --weight-decay be 0 or more")
    if not 0 <= args.gamma_std < float("inf"):
        p.error("--gamma-std must be 0 or more")


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a whole number above 0")
    return number


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
    validate: Callable[[nn.Module], float] | None,
    args: argparse.Namespace,
    out: Path | None = None,
    note: str = "",
    unit: str = "images",
) -> list[dict]:
    """Train what requires a gradient with AdamW, a warm-up and a cosine; one record an epoch.

    loss_of(model, batch): the mean loss of a batch; validate(model): accuracy 0 … 1, or None where
    all labelled data are trained on.
    unit: what a batch holds, for the bar and the speed.
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
        with tqdm(total=len(loader.dataset), desc=label, unit=f" {unit}", leave=False) as bar:
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
        val = validate(model) if validate else None
        record = {"epoch": epoch + 1, "loss": running.item() / seen, "val": val}
        history.append(record | {"seconds": seconds, f"{unit}_per_second": seen / seconds})
        if checkpoint:
            content = {"settings": settings(args), "history": history}
            content |= {"model": trained_state(model), "optimizer": optimizer.state_dict()}
            san.write(content, checkpoint)
            validated = "" if val is None else f"validation {100 * val:.1f} %  "
            speed = f"{seen / seconds:.0f} {unit}/s"
            tqdm.write(f"{label}  loss {record['loss']:.3f}  {validated}{speed}", file=sys.stdout)
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
    """The settings that decide a run's numbers; where it reads and writes does not."""
    free = ("out", "resume", "device", "data_dir", "evaluate", "compare", "table", "plot")
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


def guard(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Do a script's work; what a user can put right ends it with one sentence and an exit code.

    The device and --amp are settled first.
    2: ValueError, a usage that makes no sense; 1: OSError, a loss that is not finite, no memory
    left on the device; 130: Ctrl-C, which says what is kept and how to go on.
    """
    script = Path(sys.argv[0]).name
    try:
        args.device = pick_device(args.device)
        if args.amp is None:
            args.amp = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
        work(args)
    except KeyboardInterrupt:
        words = ["python", *(word for word in sys.argv if word != "--resume")]
        checkpoint = Path(args.out or "") / "checkpoint.pt"
        if (Path(args.out or "") / "results.jsonl").is_file():
            kept = f"every finished run is kept; to go on: {shlex.join(words)}"
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


# ----------------------------------- one run: begin, then train_and_measure, then conclude; reopen


def begin(args: argparse.Namespace, out: Path) -> None:
    """Make the folder `out` ready: for --resume, or for a new run with its config.json.

    Raises ValueError if there is nothing to resume, or files in it that are not from a run.
    """
    if args.resume:
        return require_checkpoint(out)
    names = ("adapter.pt", "merged.pt", "model.pt", "metrics.jsonl", "checkpoint.pt")
    files = [out / name for name in names if (out / name).exists()]
    if files and not (out / "config.json").exists():
        raise ValueError(f"{files[0]} is not from a run and would be lost; choose another --out")
    config = {k: str(v) if k == "device" else v for k, v in vars(args).items()}
    write_text(json.dumps(config, indent=1) + "\n", out / "config.json")
    for old in files:
        old.unlink(missing_ok=True)


def train_and_measure(
    model: nn.Module, args: argparse.Namespace, note: str, train: Callable[[], list[dict]]
) -> tuple[list[dict], dict]:
    """Train an adapted model by train(), which gives its history; figures say what that took.

    The figures are trainable (count), percent of all, seconds an epoch, peak memory in MB, and
    val, the last validation accuracy, 0 … 1.
    """
    peak_memory(args.device, start=True)
    trainable, total = count(model)
    percent = 100 * trainable / total
    print(
        f"{note}: trains {trainable:,} of {total:,} parameters, {percent:.2f} %, at lr {args.lr:g}"
    )
    history = train()
    figures = {
        "trainable": trainable,
        "percent": percent,
        "seconds": sum(record["seconds"] for record in history) / len(history),
        "memory": peak_memory(args.device),
        "val": history[-1]["val"],
    }
    return history, figures


def conclude(
    model: nn.Module,
    args: argparse.Namespace,
    history: list[dict],
    result: dict,
    read: Callable[[nn.Module], tuple[Tensor, dict]],
    content: dict,
) -> None:
    """Save what was trained, score_and_merge the model, save it merged, and report.

    result: the run's figures so far; read: as for score_and_merge; content: what a saved model
    needs beside its state dict.
    """
    out = Path(args.out)
    if args.method in ("san", "ssf"):
        san.save_adapter(model, out / "adapter.pt")
    elif args.method != "full":
        san.write({"trained": trained_state(model)}, out / "adapter.pt")
    if hasattr(model, "_san"):
        result["gamma"] = san.summary(model)["layers"]
    result |= score_and_merge(model, read)
    saved = out / ("model.pt" if args.method == "full" else "merged.pt")
    san.write(content | {"state_dict": model.state_dict()}, saved)
    write_json_lines([*history, result], out / "metrics.jsonl")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    report(result, saved)


def report(result: dict, saved: Path) -> None:
    for key, what in (("test_linear", "base + linear head"), ("test_base", "base as it comes")):
        if key in result:
            print(f"test accuracy, {what:<20}{100 * result[key]:.2f} %")
    print(f"test accuracy, {result['method']:<20}{100 * result['test']:.2f} %")
    if "perplexity" in result:
        print(f"perplexity of other documents      {result['perplexity']:.3f}")
    if len(result.get("factors", [])) > 1:
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


def reopen(
    args: argparse.Namespace, own: Iterable[str], wanted: Iterable[str]
) -> tuple[argparse.Namespace, list, Path]:
    """The settings of the saved run args.evaluate, what its model file holds, and that file.

    own: settings to take from args instead; wanted: keys of the file. Raises OSError.
    """
    folder = Path(args.evaluate)
    try:
        config = json.loads((folder / "config.json").read_text())
        if lacking := vars(args).keys() - config.keys():
            raise KeyError(f"config.json lacks {', '.join(sorted(lacking))}")
        saved = argparse.Namespace(**config | {key: getattr(args, key) for key in own})
        path = folder / ("model.pt" if saved.method == "full" else "merged.pt")
        content = san.read(path)
        return saved, [content[key] for key in wanted], path
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        raise OSError(f"{folder} is no finished run that can be scored: {error}") from error


# --------------------------------------------------------------------------------------- reports


def score_and_merge(model: nn.Module, read: Callable[[nn.Module], tuple[Tensor, dict]]) -> dict:
    """Score the adapted model on the test split, merge it in place, and score it again.

    read(model): its outputs and its scores, of which test is the accuracy, 0 … 1. Returns those
    scores, test_merged, and what compare_outputs says.
    """
    adapted, scores = read(model)
    fold(model)
    merged, scores_merged = read(model)
    return scores | {"test_merged": scores_merged["test"]} | compare_outputs(adapted, merged)


def compare_outputs(adapted: Tensor, merged: Tensor) -> dict:
    """Do two models' outputs agree? Along the last axis: classes, options or words.

    merge_difference: the largest absolute difference; merge_same: the share, 0 … 1, of pictures,
    questions or tokens with the same largest output.
    """
    difference = (adapted - merged).abs().max().item()
    same = (adapted.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return {"merge_difference": difference, "merge_same": same}


def write_text(text: str, path: Path) -> None:
    """Write a small text file whole or not at all. Raises OSError."""
    san.write(text, path, save=lambda content, file: file.write_text(content))


def write_json_lines(records: list[dict], path: Path) -> None:
    write_text("".join(json.dumps(record) + "\n" for record in records), path)


class Journal:
    """A file of results, one JSON line a run; what is in it need not be done again.

    A line holds a run's task, model and method, its part (search: a learning rate tried, or test:
    scored on the test split), lr, seed, its figures, and the options it was made with. Lines are
    only ever appended, so that several commands can write to one file at once.
    """

    def __init__(self, path: Path, options: dict):
        """options: what lines must have been made with to count here.

        Raises OSError if the file is broken or its folder cannot be made.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.exists() else ""
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror}") from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a last line that the power or the disk cut off
            write_text(whole, path)
        self.path, self.options, self.lines = path, options, read_results(path)

    def find(self, key: dict) -> list[dict]:
        """The lines that hold all of `key`, and were made with these options."""
        key = key | {"options": self.options}
        return [line for line in self.lines if key.items() <= line.items()]

    def add(self, line: dict) -> dict:
        """Append a line, with the options. Raises OSError if it cannot be written."""
        line = line | {"options": self.options}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def read_results(path: Path) -> list[dict]:
    """The lines of a Journal's file; none if it is not there. Raises OSError if it is broken."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        needed = {"task", "model", "method", "part", "lr", "seed", "val", "options"}
        if any(needed - line.keys() for line in lines):
            raise ValueError("a line lacks entries")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, AttributeError) as error:
        raise OSError(f"{path} is broken ({error}); move it away and start again") from error
    return lines


def search(
    args: argparse.Namespace,
    key: dict,
    rates: Iterable[float],
    train: Callable[[argparse.Namespace, bool], tuple[nn.Module, dict]],
    read: Callable[[nn.Module], tuple[Tensor, dict]],
    journal: Journal,
    again: bool = False,
) -> list[dict]:
    """Choose a method's learning rate on validation, then train and score it with every seed.

    Returns the journal's lines of the scored runs.

    key: the task, model and method; rates: those to choose from; args.lr, if given, is the only
    one. train(args, last): a model and its figures, at args.lr and args.seed; last is False while
    rates are tried. read: as for `score_and_merge`.
    Every rate is tried with seed 0; the best by validation is scored on the test split, then the
    other seeds; again: the best is trained anew with seed 0 too, since its last training differs.
    A rate at which the loss does not stay finite is out, and recorded with val None.
    """

    def trained(rate: float, seed: int, last: bool) -> tuple[nn.Module, dict]:
        own = vars(args) | {"method": key["method"], "lr": rate, "seed": seed}
        model, figures = train(argparse.Namespace(**own), last)
        model.zero_grad()  # the best is kept while others train: without its gradients
        if figures["val"] is not None:
            print(f"  validation {100 * figures['val']:.1f} %", flush=True)
        return model, figures

    kept, tried = None, {}
    for rate in [args.lr] if args.lr else rates:
        run = key | {"part": "search", "lr": rate, "seed": 0}
        if not (lines := journal.find(run)):
            try:
                model, figures = trained(rate, 0, last=False)
            except FloatingPointError as error:
                model, figures = None, {"val": None}
                print(f"  {error}")
            lines = [journal.add(run | figures)]
            if figures["val"] is not None and figures["val"] > max(tried.values(), default=-1):
                kept = rate, model, figures
        if lines[0]["val"] is not None:
            tried[rate] = lines[0]["val"]
    if not tried:
        raise FloatingPointError(f"{key['method']} stayed finite at no learning rate of {rates}")
    rate, scored = max(tried, key=tried.get), []
    for seed in range(args.seeds):
        run = key | {"part": "test", "lr": rate, "seed": seed}
        if lines := journal.find(run):
            scored.append(lines[-1])
            continue
        if seed == 0 and kept and kept[0] == rate and not again:
            _, model, figures = kept
        else:
            model, figures = trained(rate, seed, last=True)
        scored.append(journal.add(run | figures | score_and_merge(model, read)))
    return scored


def compare(
    args: argparse.Namespace,
    out: Path,
    keys: list[dict],
    work: Callable[[dict, Journal], list[dict]],
) -> None:
    """Tables of work(key, journal), a `search`, for every key: task, model and method.

    What is done is kept in results.jsonl, run by run, and not done again by the same command.
    """
    options = settings(args) | dict.fromkeys(("task", "model", "method", "seeds"))
    journal = Journal(out / "results.jsonl", options)
    lines = [line for key in keys for line in work(key, journal)]
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"`{command}`\n\n{tables(lines)}"
    write_text(text, out / "table.md")
    print(f"\n{text}\nsaved {out / 'table.md'}")


def tables(lines: list[dict]) -> str:
    """Two Markdown tables of a Journal's lines: a row for each method, and for each task of it.

    The first has the mean over all tasks, and over those of each group if the lines name groups;
    it stays empty for a method that lacks one of them. Runs with other options have rows of their
    own, which name what differs. Raises ValueError if no run is scored.
    """
    lines = [line for line in lines if line["part"] == "test"]
    if not lines:
        raise ValueError("there is no scored run to tabulate")
    options = [line["options"] for line in lines]
    differ = [k for k in options[0] if any(own.get(k) != options[0][k] for own in options)]
    runs: dict[tuple, dict[str, dict]] = {}  # model and method → task → seed → line
    for line in lines:
        own = [f"{key} {line['options'].get(key)}" for key in differ]
        by_task = runs.setdefault((line["model"], ", ".join([line["method"], *own])), {})
        by_task.setdefault(line["task"], {})[line["seed"]] = line
    group_of = {line["task"]: line.get("group") for line in lines}
    means = {group: [t for t in group_of if group_of[t] == group] for group in group_of.values()}
    means = {g: own for g, own in means.items() if g} | {"mean": list(group_of)}
    means = means if len(group_of) > 1 else {}
    short, long = [], []
    for (model, method), by_task in runs.items():
        seeds = {task: list(own.values()) for task, own in by_task.items()}
        accuracies = {task: [run["test"] for run in own] for task, own in seeds.items()}
        percent = next(iter(seeds.values()))[0]["percent"]
        row = {"model": model, "method": method, "trained": f"{percent:.2f} %"}
        row |= {t: spread(accuracies[t]) if t in accuracies else "" for t in group_of}
        for name, own in means.items():
            whole = all(task in accuracies for task in own)
            each = [statistics.mean(accuracies[task]) for task in own] if whole else []
            row[name] = f"{100 * statistics.mean(each):.1f}" if whole else ""
        short.append(row)
        long += [detail(own) | {"method": method} for own in seeds.values()]
    return markdown(short) + "\n" + markdown(long)


def detail(runs: list[dict]) -> dict[str, str]:
    """The columns of one method on one task: `runs` are its scored seeds."""
    same = min(run["merge_same"] for run in runs)
    gap = max(run["merge_difference"] for run in runs)
    return {
        **{name: runs[0][name] for name in ("model", "task", "method")},
        **{k: spread([run["parts"][k] for run in runs]) for k in runs[0].get("parts", [])},
        "test accuracy, %": spread([run["test"] for run in runs]),
        "trained": f"{runs[0]['trainable']:,} ({runs[0]['percent']:.2f} %)",
        "lr": f"{runs[0]['lr']:g}",
        "s/epoch": f"{min(run['seconds'] for run in runs):.2f}",
        "peak MB": f"{max(run['memory'] for run in runs):.0f}",
        "merged = adapted": f"{100 * same:.1f} %, {gap:.0e}",
    }


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: list[float]) -> str:
    """Per cent, mean ± standard deviation (n − 1) of shares: '54.1 ± 0.8'."""
    tensor = torch.tensor(values, dtype=torch.float64) * 100
    deviation = tensor.std().item() if len(values) > 1 else 0.0
    return f"{tensor.mean().item():.1f} ± {deviation:.1f}"
