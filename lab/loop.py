"""One run: its flags, its training, what it survives, and how it ends.

`fit` is the one training loop; an epoch that has ended is on disk and can be resumed from.
A run is `begin`, then `train_and_measure`, then `conclude`; `reopen` reads it again.
[P] the paper, [us] our choice, as in san.py.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import models
import san
from lab import methods, ranks, saved
from lab.log import NOWHERE, PACKAGES, Log, gammas

FINISHED = ("merged.pt", "model.pt")  # one of them in its folder, and a run is finished
BLOCKS = (models.ViTBlock, models.ConvNeXtBlock, models.SwinBlock, models.LLaMABlock)
# where a run reads and writes, what loads its pictures, and which runs a command is about
FREE = ("out", "resume", "device", "workers", "data_dir", "evaluate")
FREE += ("compare", "table", "plot", "methods", "log", "shard")
# what trains nothing, and the flags that it reads
ALONE = {
    "evaluate": ("device", "workers", "data_dir", "shard", "score", "ask"),
    "table": ("seeds",),
    "plot": ("out",),
}
# what runs did before there were flags for it
LATER = {"accumulate": 1, "recompute": False, "pretrain": False, "tower": False, "blind": False}
LATER |= dict.fromkeys(("test_shots", "alpha", "methods", "projector_lr")) | {"ask": "options"}

# -------------------------------------------------------------------------------- the training loop


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU. Raises ValueError for what is not there.

    On CUDA it asks torch for its deterministic kernels: same seed, same machine, same result.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        name = ranks.gpu(name)
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


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model there, on a GPU with channels last in a convolution's weight, as it wants them."""
    cuda = device.type == "cuda"
    return model.to(device, memory_format=torch.channels_last if cuda else torch.preserve_format)


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate: linear up to `peak` over `warmup` steps, then a half cosine towards 0."""
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
    average: float = 0.0,
    weigh: Callable[[tuple], float] = lambda batch: len(batch[0]),
    log: Log = NOWHERE,
    spare: tuple | None = None,
) -> list[dict]:
    """Train what requires a gradient with AdamW, a warm-up and a cosine; one record per epoch.

    loss_of(model, batch): the mean loss of a batch; validate(model): accuracy 0 … 1, or None where
    all labelled data are trained on; weigh(batch): how many losses that mean is of.
    unit: what a batch holds, for the bar and the speed.
    out: folder for checkpoint.pt, written after every epoch, which is then reported in a line;
    args.resume continues from it.
    average: the decay per step of a moving average of the parameters, which is validated, and kept
    in the end; 0: no average.
    args.accumulate: in how many parts a batch, a tuple of tensors, goes through the model; a step
    is the same but for rounding, and takes the memory of a part. Under torchrun the loader gives
    every rank its own rows of a batch, () for none.
    spare: a part that counts for nothing, which a rank of a sharded model reads where it has less
    than others: each reads args.accumulate parts of every batch.
    log: gets loss and rate every 20 steps, and the record and every γ after each epoch.
    Every epoch seeds itself from (seed, epoch), so that a resumed run goes the same way.
    Raises FloatingPointError when the loss or a parameter is no longer finite: the checkpoint of
    the epoch before stays. ValueError for a checkpoint made with other settings.
    """
    if ranks.is_sharded(model):
        model.reshard()  # what scoring has left gathered is a copy, and none to train
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups_of(model, args), lr=args.lr, fused=True)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    device = parameters[0].device
    history: list[dict] = []
    checkpoint = out and out / "checkpoint.pt"
    if checkpoint and args.resume:
        history = resume(checkpoint, model, optimizer, mean, args)
    log.step = len(history) * len(loader) - 1  # the last that is done
    steps, warmup = args.epochs * len(loader), round(args.warmup_epochs * len(loader))
    for epoch in range(len(history), args.epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)
        model.train()
        started, seen, running = time.perf_counter(), 0, torch.zeros((), device=device)
        label = f"{note} epoch {epoch + 1}/{args.epochs}"
        with tqdm(total=len(loader.dataset), desc=label, unit=f" {unit}", leave=False) as bar:
            for i, batch in enumerate(loader):
                at = epoch * len(loader) + i
                rate = rate_at(at, steps, warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("share", 1.0)
                optimizer.zero_grad()
                loss, rows = backward(model, parameters, batch, loss_of, weigh, args, spare)
                optimizer.step()
                if mean:
                    mean.update_parameters(model)
                running += loss * rows
                seen += rows
                if i % 20 == 0 or i == len(loader) - 1:  # reading the loss makes the device wait
                    now = loss.item()
                    require_finite(now, [], epoch, rate, checkpoint)
                    bar.set_postfix(loss=f"{running.item() / seen:.3f}", lr=f"{rate:.1e}")
                    log.write("train", {"loss": now, "rate": rate}, at)
                bar.update(rows)
        seconds = time.perf_counter() - started
        require_finite(running.item(), parameters, epoch, rate, checkpoint)
        val = validate(mean.module if mean else model) if validate else None
        record = {"epoch": epoch + 1, "loss": running.item() / seen, "val": val}
        history.append(record | {"seconds": seconds, f"{unit}_per_second": seen / seconds})
        log.write("epoch", history[-1], at, ranks.gathered(gammas(model)))
        if not checkpoint:
            continue
        content = {"settings": settings(args), "history": history}
        content |= {"model": methods.trained_state(model), "optimizer": optimizer.state_dict()}
        content |= {"mean": mean.state_dict()} if mean else {}
        content = ranks.gathered(content)
        if not ranks.number():
            san.write(content, checkpoint)
            left = (args.epochs - epoch - 1) * (time.perf_counter() - started)
            tqdm.write(f"{label}  {in_short(history[-1], unit, left)}", file=sys.stdout)
    if mean:
        model.load_state_dict(mean.module.state_dict())
    return history


def backward(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: tuple,
    loss_of: Callable[[nn.Module, tuple], Tensor],
    weigh: Callable[[tuple], float],
    args: argparse.Namespace,
    spare: tuple | None,
) -> tuple[Tensor, float]:
    """Add a batch's gradients, part by part, over all ranks; its mean loss, and number of rows.

    What is given is as in `fit`; parameters: those that train.
    """
    device = parameters[0].device
    own = (len(batch[0]), weigh(batch)) if batch else (0, 0)
    loss, (rows, whole) = torch.zeros((), device=device), ranks.total(*own)
    parts = [*zip(*(tensor.chunk(args.accumulate) for tensor in batch))]
    parts = [(part, weigh(part) / whole) for part in parts]
    parts += [(spare, 0.0)] * (args.accumulate - len(parts) if spare else 0)
    for part, weight in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            share = loss_of(model, part) * weight
        share.backward()
        loss += share.detach()
    ranks.add_up(loss, parameters)
    return loss, rows


def in_short(record: dict, unit: str, left: float) -> str:
    """An epoch's record in few words; left: how many seconds the epochs after it take."""
    validation = "" if record["val"] is None else f"validation {100 * record['val']:.1f} %  "
    speed = f"{record[f'{unit}_per_second']:.1f} {unit}/s"
    wait = f"  {duration(left)} left" if left else ""
    return f"loss {record['loss']:#.4g}  {validation}{speed}{wait}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds > 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 60 else f"{seconds:.0f} s"


def groups_of(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """What requires a gradient, in AdamW's groups: those that decay and those that do not.

    args.projector_lr, if any, is the rate of a LLaVA's projector: it has groups of its own, and
    `share` is what to multiply the others' rate by.
    """
    parts: dict[float, list[nn.Parameter]] = {1.0: []}
    own = getattr(args, "projector_lr", None)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = own / args.lr if own and name.startswith("projector.") else 1.0
            parts.setdefault(share, []).append(parameter)
    # decay would pull γ to 0 rather than to the 1 it starts at: only matrices shrink [us]
    return [
        {"params": [p for p in part if (p.ndim > 1) == matrices], "weight_decay": decay}
        | {"share": share}
        for share, part in parts.items()
        for matrices, decay in ((True, args.weight_decay), (False, 0.0))
    ]


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """In it, a block keeps its input alone for the backward pass, and computes the rest again.

    Chen et al. 2016. The gradients are the same. A step takes another forward pass, and memory for
    one block's activations in place of all blocks'.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


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


def changed(args: argparse.Namespace, **own) -> argparse.Namespace:
    """A copy of the settings, some of them changed."""
    return argparse.Namespace(**vars(args) | own)


def settings(args: argparse.Namespace) -> dict:
    """The settings that decide a run's numbers: all but those that are FREE."""
    return {key: value for key, value in vars(args).items() if key not in FREE}


def as_now(options: dict) -> dict:
    """Settings of an earlier run: what it had no flag for is as LATER, what is FREE left out."""
    return {key: value for key, value in (LATER | options).items() if key not in FREE}


def given(p: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """The settings that were given otherwise than by default, as text; args: as they are parsed."""
    own = {k: v for k, v in settings(args).items() if v != p.get_default(k)}
    own |= {"data_dir": args.data_dir} if args.data_dir else {}  # runs on it are other runs
    return {k: "+".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in own.items()}


def default_out(data: str, model: str, args: argparse.Namespace, more: dict[str, str]) -> str:
    """runs/<data>-<model>-<method>-seed<k>, then what is `more` and not told yet.

    more: what was `given`, so that no run takes the folder of another. A long name ends in a
    checksum.
    """
    words = [data, model, args.method, f"seed{args.seed}"]
    told = ("method", "seed", "task")  # a task is in the name of its data
    words += [f"{k}={v}" for k, v in more.items() if k not in told and v not in (data, model)]
    name = re.sub(r"[^\w.,+=-]+", "_", "-".join(words))
    if len(name) > 150:
        name = f"{name[:140]}-{zlib.crc32(name.encode()):08x}"
    return f"runs/{name}"


def require_checkpoint(out: Path) -> None:
    """Raise ValueError if the folder `out` holds nothing to resume from, or a finished run."""
    if any((out / name).is_file() for name in FINISHED):
        raise ValueError(f"the run in {out} is finished; score it with --evaluate {out}")
    if not (out / "checkpoint.pt").is_file():
        raise ValueError(f"there is no checkpoint in {out} to resume; start without --resume")


def resume(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: AveragedModel | None,
    args: argparse.Namespace,
) -> list[dict]:
    """Put a checkpoint's epoch back into model, optimizer and mean; the history so far is returned.

    Raises ValueError if it was made with other settings, OSError if it is broken.
    """
    content = saved.checkpoint(checkpoint)
    old, new = LATER | content["settings"], settings(args)
    other = [key for key in new if old.get(key) != new[key]]
    if other:
        key = other[0]
        raise ValueError(
            f"{checkpoint} was made with {key} = {old.get(key)}, not {new[key]}; resume with the "
            "same settings"
        )
    own, moments = methods.trained_state(model), content["optimizer"].get("state")
    numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
    adam = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in numbered}
    here = {"model": own, "optimizer": adam} | ({"mean": mean.state_dict()} if mean else {})
    there = {"model": content["model"], "optimizer": moments, "mean": content.get("mean")}
    saved.require_alike(checkpoint, {key: there[key] for key in here}, here)
    if len(content["history"]) > args.epochs:
        raise OSError(f"{checkpoint} is broken: it has more epochs than the run; start again")
    with torch.no_grad():
        for name, value in content["model"].items():
            own[name].copy_(ranks.spread(value, own[name]))
    for i, state in moments.items():
        moments[i] = {name: ranks.spread(value, adam[i][name]) for name, value in state.items()}
    groups = optimizer.state_dict()["param_groups"]  # the flags say what is in them
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if mean:
        mean.load_state_dict(content["mean"])
    return content["history"]


def guard(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Do a script's work; what a user can put right ends it with one sentence and an exit code.

    The device and --amp are settled first. Any other exception is a fault of ours, and is raised.
    2: ValueError, a usage that makes no sense; 1: OSError, a loss that is not finite, no memory
    left on the device; 130: Ctrl-C, which says what is kept and how to go on.
    """
    script = Path(sys.argv[0]).name
    try:
        with ranks.joined():
            args.device = pick_device(args.device)
            if args.amp is None:
                args.amp = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
            work(args)
    except KeyboardInterrupt:
        words = [*ranks.command(), *(word for word in sys.argv if word != "--resume")]
        checkpoint = Path(args.out or "") / "checkpoint.pt"
        if (Path(args.out or "") / "results.jsonl").is_file():
            kept = f"every finished run is kept; to go on: {shlex.join(words)}"
        elif args.evaluate or not checkpoint.is_file():
            kept = "nothing was finished yet, start again with the same command"
        else:
            again, epoch = shlex.join([*words, "--resume"]), "an epoch"
            with contextlib.suppress(OSError):  # it may be broken
                epoch = f"epoch {len(saved.checkpoint(checkpoint)['history'])}"
            kept = f"{epoch} is kept in {checkpoint}; to go on: {again}"
        print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0].partition(". ")[0] or repr(error)
        if not re.search("MemoryError|out of memory|allocate", said):
            raise
        smaller = "try --accumulate 4, --recompute, or a smaller --batch-size"
        ranks.say(f"{script}: there is no memory left ({said}); {smaller}")
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        said = str(error)
        if "\nOriginal Traceback" in said:  # a loader's process passes on all that it would print
            said = said.strip().splitlines()[-1].split(": ", 1)[-1]
        ranks.say(f"{script}: {' '.join(said.split())}")
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


# --------------------------------------------------------------------------- one run, in this order


@contextlib.contextmanager
def holding(path: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """In it, no other run has the folder `path`, which is made; shared: none but comparisons do.

    The system's flock on the folder itself: it leaves no file behind, and ends with the process,
    however that ends. Where there is none, as on Windows, that is said and nothing is held. path
    may be a file; wait: until it is free. Raises OSError if another run has the folder, or if it
    cannot be made.
    """
    with contextlib.ExitStack() as held:
        try:
            path.exists() or path.mkdir(parents=True, exist_ok=True)
            opened = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror}") from error
        held.callback(os.close, opened)
        try:
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(opened, kind if wait else kind | fcntl.LOCK_NB)
            held.callback(fcntl.flock, opened, fcntl.LOCK_UN)  # a loader's processes have it too
        except BlockingIOError as error:
            raise OSError(f"another run is writing into {path}; choose another --out") from error
        except (ImportError, OSError) as error:
            if not wait:
                print(f"{path} cannot be locked ({error}): start no second run with it meanwhile")
        yield


@contextlib.contextmanager
def begin(args: argparse.Namespace, out: Path) -> Iterator[Log]:
    """Make the folder `out` ready, for --resume or for a new run with its config.json; and hold it.

    The log of the run is given. Of several ranks the first alone does so, and has the log. Raises
    ValueError if there is nothing to resume, or files in `out` that are not from a run; both as
    `holding` and `Log` do.
    """
    if args.resume:
        require_checkpoint(out)
    if ranks.number():
        yield NOWHERE
        return
    with holding(out), Log(args.log or (), out, settings(args), args.resume) as log:
        if not args.resume:
            make_room(args, out)
        yield log


def make_room(args: argparse.Namespace, out: Path) -> None:
    """Remove an older run from `out` and write config.json. Raises ValueError as `begin`."""
    names = (*FINISHED, "adapter.pt", "merged", "tensorboard", "metrics.jsonl", "checkpoint.pt")
    files = [out / name for name in names if (out / name).exists()]
    if files and not (out / "config.json").exists():
        raise ValueError(f"{files[0]} is not from a run and would be lost; choose another --out")
    for old in files:  # before the new settings are there: no model ever stands beside another's
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    config = {k: str(v) if k == "device" else v for k, v in vars(args).items()}
    write_text(json.dumps(config, indent=1) + "\n", out / "config.json")


def train_and_measure(
    model: nn.Module, args: argparse.Namespace, note: str, train: Callable[[], list[dict]]
) -> tuple[list[dict], dict]:
    """Train an adapted model by train(), which gives its history; figures say what that took.

    The figures are trainable (count), percent of all, seconds per epoch, peak memory in MB, and
    val, the last validation accuracy, 0 … 1.
    """
    peak_memory(args.device, start=True)
    trainable, total = methods.count(model)
    percent = 100 * trainable / total
    print(
        f"{note}: trains {trainable:,} of {total:,} parameters, {percent:.2f} %, at lr {args.lr:g}"
    )
    with recomputing(model) if args.recompute else contextlib.nullcontext():
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
    test: Callable[[nn.Module], tuple[Tensor, dict]],
    content: dict,
    export: Callable[[nn.Module, dict], None] = lambda merged, state: None,
    log: Log = NOWHERE,
) -> None:
    """Save what was trained, score_and_merge the model, save it merged, and report.

    result: the run's figures so far; test: as for score_and_merge; content: what a saved model
    needs beside its state dict; export: what else is to be written of the merged model and its
    state dict; log: gets the figures, and a LLaMA's by task.
    """
    if ranks.number() and not ranks.is_sharded(model):  # the first writes, and this one helps it
        test(model), methods.fold(model), test(model)
        return
    out = Path(args.out)
    if args.method in ("san", "ssf"):  # all ranks gather what the first writes
        adapter = san.adapter_of(model)
    elif args.method != "full":
        adapter = {"trained": ranks.gathered(methods.trained_state(model))}
    if args.method != "full" and not ranks.number():
        san.write(adapter, out / "adapter.pt")
    if hasattr(model, "_san"):
        result["gamma"] = san.summary(model)["layers"]
    result |= score_and_merge(model, test)
    state = ranks.gathered(model.state_dict())
    if ranks.number():
        return
    log.write("result", result | result.get("parts", {}))
    write_json_lines([*history, result], out / "metrics.jsonl")
    export(model, state)
    path = out / ("model.pt" if args.method == "full" else "merged.pt")
    san.write(content | {"state_dict": state}, path)  # the last: it says finished
    (out / "checkpoint.pt").unlink(missing_ok=True)
    report(result, path)


def report(result: dict, path: Path) -> None:
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
        f"saved {path} and, beside it, {', '.join(sorted(p.name for p in path.parent.iterdir()))}"
    )


def reopen(
    args: argparse.Namespace, own: Iterable[str], wanted: Iterable[str]
) -> tuple[argparse.Namespace, list, Path]:
    """The settings of the saved run args.evaluate, what its model file holds, and that file.

    own: settings to take from args instead, where these are given; wanted: keys of the file.
    Raises OSError.
    """
    folder = Path(args.evaluate)
    try:
        if not (folder / "config.json").exists():
            raise FileNotFoundError("it has no config.json")
        config = LATER | saved.config(folder)
        for setting, script in (("dataset", "train_vision.py"), ("data", "train_lm.py")):
            if setting in config and not hasattr(args, setting):
                raise OSError(f"it is a run of {script}; give it to that")
        if lacking := settings(args).keys() - config.keys():
            raise OSError(f"config.json lacks {', '.join(sorted(lacking))}")
        here = {key: vars(args)[key] for key in own if vars(args)[key] is not None}
        config = changed(args, **config | here)
        path = folder / ("model.pt" if config.method == "full" else "merged.pt")
        content = saved.model(path, wanted)
        return config, [content[key] for key in wanted], path
    except OSError as error:
        raise OSError(f"{folder} is no finished run that can be scored: {error}") from error


@contextlib.contextmanager
def as_saved_in(folder: str) -> Iterator[None]:
    """What is wrong in it comes of a run's settings: the error names their file, too."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{error}; so {Path(folder) / 'config.json'} has it") from error


# ------------------------------------------------------------------------------ is the merge exact?


def score_and_merge(
    model: nn.Module,
    test: Callable[[nn.Module], tuple[Tensor, dict]],
    check: Callable[[nn.Module], Tensor] | None = None,
) -> dict:
    """Score the adapted model on the test split, merge it in place, and compare its outputs.

    test(model): its outputs and its scores, of which test is the accuracy, 0 … 1. Returns those
    scores, what compare_outputs says, and test_merged. check(model): fewer outputs to compare in
    place of the test split's, where these take long; then there is no test_merged.
    """
    adapted, scores = test(model)
    if check:
        adapted = check(model)
        methods.fold(model)
        return scores | compare_outputs(adapted, check(model))
    methods.fold(model)
    merged, scores_merged = test(model)
    return scores | {"test_merged": scores_merged["test"]} | compare_outputs(adapted, merged)


def compare_outputs(adapted: Tensor, merged: Tensor) -> dict:
    """Do two models' outputs agree? Along the last axis: classes, options or words.

    merge_difference: the largest absolute difference; merge_same: the share, 0 … 1, of pictures,
    questions or tokens with the same largest output.
    """
    difference = (adapted - merged).abs().max().item()
    same = (adapted.argmax(-1) == merged.argmax(-1)).float().mean().item()
    return {"merge_difference": difference, "merge_same": same}


# --------------------------------------------------------------------------------------- text files


def write_text(text: str, path: Path) -> None:
    """Write a small text file whole or not at all. Raises OSError."""
    san.write(text, path, save=lambda content, file: file.write_text(content))


def write_json_lines(records: list[dict], path: Path) -> None:
    write_text("".join(json.dumps(record) + "\n" for record in records), path)


# -------------------------------------------------------------------------------------------- flags


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells a default where there is one: None is said in words, False is a flag left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        untold = action.default is None or action.default is False
        return action.help if untold else super()._get_help_string(action)


def add_flags(
    p: argparse.ArgumentParser,
    names: Iterable[str],
    rows: Iterable[str],
    epochs: str,
    batch: int,
) -> None:
    """The flags that every training script has; names: the methods, rows: a comparison's.

    epochs: how many, in words, since the script fills them in.
    """
    add, yes_no = p.add_argument, argparse.BooleanOptionalAction
    add("--method", default="san", choices=names, help="adapt in lab/methods.py says what each is")
    add("--mode", default="both", choices=list(methods.MODES), help="the uses of γ: SAN's ablation")
    add("--norms", default=True, action=yes_no, help="train the norms with SAN and its kin")
    add("--gamma-std", type=float, default=0.0, help="SAN's γ start at 1 ± this")
    add("--rank", type=positive, default=8, help="of LoRA and DoRA")
    add("--alpha", type=float, help="of LoRA and DoRA: the update times α / rank; default: rank")
    add("--epochs", type=positive, help=f"passes over what is trained on; {epochs}")
    add("--batch-size", type=positive, default=batch, help="examples per step")
    add("--accumulate", type=positive, default=1, help="parts in which a batch is read")
    add("--recompute", action="store_true", help="keep fewer activations, compute them again")
    add("--lr", type=float, help="by default what suits the method")
    add("--weight-decay", type=float, default=0.0, help="of matrices; γ, β and norms have none")
    add("--warmup-epochs", type=float, help="by default a tenth of the epochs")
    add("--seed", type=int, default=0, help="0 … 9999")
    add("--device", default="auto", help="cpu, cuda, …")
    add("--amp", action=yes_no, help="bfloat16 autocast; by default on a GPU that has it")
    add("--out", help="default: runs/<data>-<model>-<method>-seed<k>, then what else was given")
    add("--log", nargs="+", choices=[*PACKAGES], help="to look at while it trains; into --out")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--evaluate", metavar="RUN", help="score a saved run again, train nothing")
    add("--compare", action="store_true", help="all methods, learning rates searched; one table")
    only = f"of a comparison's rows these alone: {'; '.join(rows)}"
    add("--methods", nargs="+", choices=rows, metavar="ROW", help=only)
    add("--table", nargs="+", metavar="RUN", help="comparisons' results.jsonl as Markdown tables")
    add("--seeds", type=count, default=3, help="how many, where tables are made; 0: try rates only")


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace, many: bool) -> None:
    """Fill in what add_flags leaves open; a combination without a sense ends the program.

    many: whether the flags ask for a table of runs rather than one.
    """
    if many and (args.resume or args.seed):
        p.error("a comparison takes --seeds, the number of them, and goes on by itself")
    if args.seeds != p.get_default("seeds") and not (many or args.table):
        p.error("--seeds is of comparisons; a run has one --seed")
    if many and args.log:
        p.error("--log is of one run; a comparison is drawn by train_vision.py --plot")
    if ranks.count() > 1 and (many or args.table or getattr(args, "plot", None)):
        p.error(
            "torchrun is for one run: start tables and plots with python, and to share out a "
            "comparison several of it, each with --methods of its own"
        )
    if args.alpha is not None and not 0 < args.alpha < float("inf"):
        p.error("--alpha must be a number above 0")
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
    if not args.resume:  # runs from before this check go on
        check_readers(p, args)


def check_alone(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Beside --evaluate, --table or --plot a flag that these do not read ends the program.

    args: as they are parsed, with nothing filled in.
    """
    for name, reads in ALONE.items():
        if getattr(args, name, None):
            for other, value in vars(args).items():
                if other not in (name, *reads) and value != p.get_default(other):
                    p.error(f"--{name} does not read {as_flag(other, value)}; leave it out")


def as_flag(name: str, value: object) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def check_readers(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A flag that nothing in the run would read ends the program.

    A comparison's flags reach those of its rows that read them; SAN's variants set theirs.
    """
    if args.compare:
        return
    ablation = getattr(args, "ablation", False)
    for name, readers in methods.READERS.items():
        value = vars(args).get(name, p.get_default(name))
        if value != p.get_default(name) and (ablation or args.method not in readers):
            what = "--ablation" if ablation else f"--method {args.method}"
            p.error(f"{as_flag(name, value)} changes nothing in {what}; leave it out")


def positive(word: str) -> int:
    if (number := count(word)) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number above 0")
    return number


def count(word: str) -> int:
    if (number := int(word)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number
