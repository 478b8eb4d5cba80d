"""What a SAN step costs: ratios of step times, measured in turn in one process.

    python -m lab.bench                 # a ViT, then a LLaMA, each as wide as a real one
    python -m lab.bench --model llama   # one of them
    python -m lab.bench --full-size     # ViT-B/16 at 224 px: images/s, FLOP/s, memory, as a table

vit: ViT-B/16's width and 224 px. llama: 1024 channels and 128 tokens, LoRA and DoRA of rank 32 on
the layers of methods.LOW_RANK, as in the papers' language results.
Speed is a ratio here, since machines differ and drift: every round times one step of each method
in turn, and the median over rounds of the ratio to full fine-tuning is what is printed. The
merged model is timed against the base model in the same way.
--full-size goes through train_vision's training loop and data path, with pictures of CIFAR's
size.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from lab import batches, loop, methods, tables


def seconds(function, device: torch.device) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def in_turn(functions: dict, device: torch.device, rounds: int, against: str) -> dict[str, float]:
    """name → median over rounds of its time divided by that of `against` in the same round."""
    for function in functions.values():
        function()  # a first call allocates
    times = [{name: seconds(f, device) for name, f in functions.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] / t[against] for t in times) for name in functions}


def vit(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, its inputs and their labels."""
    model = models.ViT(100, 224, patch=16, dim=768, depth=depth, heads=12)
    return model, torch.randn(batch, 3, 224, 224), torch.randint(100, (batch,))


def llama(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of a language model; a token's label is the token after it."""
    size = dict(dim=1024, depth=depth, heads=16, kv_heads=4, hidden=2816, context=128)
    tokens = torch.randint(1000, (batch, 129))
    return models.LLaMA(1000, **size), tokens[:, :-1], tokens[:, 1:]


# name: what builds it, the rank of LoRA and DoRA, and the methods to time
MODELS = {
    "vit": (vit, 8, ("linear", "full", "lora", "ssf", "san")),
    "llama": (llama, 32, ("full", "lora", "dora", "ssf", "san", "san+lora")),
}

# the training scripts' flags as they are by default, for one epoch
OPTIONS = dict(wiring="san", mode="both", norms=True, gamma_std=0.0, seed=0, resume=False)
OPTIONS |= dict(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0.1)


def report(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the ratios of one model."""
    torch.manual_seed(0)
    build, rank, methods = MODELS[name]
    options = argparse.Namespace(**OPTIONS, shift=name == "vit", rank=rank)
    base, inputs, labels = (x.to(device) for x in build(args.depth, args.batch_size))

    def stepper(method: str):
        model = copy.deepcopy(base)
        methods.adapt(model, method, options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = model(inputs).flatten(0, -2)  # one row per picture or token
                loss = F.cross_entropy(logits, labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    merged = copy.deepcopy(base)
    methods.adapt(merged, "san", options)
    methods.fold(merged)
    assert methods.count(merged)[1] == methods.count(base)[1]

    print(f"{name}: {args.depth} blocks, batch {args.batch_size}, {device}")
    steps = in_turn({m: stepper(m) for m in methods}, device, args.rounds, "full")
    for method, ratio in steps.items():
        print(f"step, {method:<9}{ratio:5.2f} × full   {ratio / steps['lora']:5.2f} × lora")
    with torch.no_grad():
        forwards = {"base": lambda: base(inputs), "merged": lambda: merged(inputs)}
        ratio = in_turn(forwards, device, 3 * args.rounds, "base")["merged"]
    print(f"forward, merged {ratio:5.2f} × base, with as many parameters")


# ------------------------------------------------------------------------------- ViT-B/16 at 224


def full_size(args: argparse.Namespace, device: torch.device) -> None:
    """Print a Markdown table: what a step of ViT-B/16 at 224 px takes, method by method.

    images/s: of train_vision's loop, crops, flips and the optimizer included; not the model: the
    share of that time which forward, loss and backward alone do not take; TFLOP/s: those that
    torch counts in these three, and their share of what one large matrix product reaches.
    Times are medians over rounds. Peak memory is torch's on a GPU, the process's on a CPU.
    """
    options = argparse.Namespace(
        **OPTIONS, device=device, amp=args.amp, batch_size=args.batch_size, shift=True, rank=8
    )
    count = args.batch_size * args.steps
    images = torch.randint(256, (count, 3, 32, 32)).byte()
    pictures = batches.Resident(images, torch.randint(100, (count, 1)), 224, "crop+flip").to(device)
    most = product_rate(device, torch.bfloat16 if args.amp else torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} CPU threads, {most / 1e12:.3f} TFLOP/s in one product"
    )
    methods = ("linear", "full", "lora", "ssf", "san")
    figures = {m: one_method(m, pictures, options, args.rounds) for m in methods}
    rows = [
        {
            "method": method,
            "trained": f"{f['trained']:,}",
            "images/s": f"{count / f['whole']:.1f}",
            "step, × full": f"{f['whole'] / figures['full']['whole']:.2f}",
            "not the model": f"{100 * f['rest']:.1f} %",
            "TFLOP/s": f"{f['flops'] / f['inner'] / 1e12:.3f} "
            f"({100 * f['flops'] / f['inner'] / most:.0f} %)",
            "peak MB": f"{f['memory']:.0f}",
        }
        for method, f in figures.items()
    ]
    print(tables.markdown(rows))


def one_method(
    method: str, pictures: batches.Resident, options: argparse.Namespace, rounds: int
) -> dict[str, float]:
    """Seconds of an epoch as trained and of its model alone, what else took of it, FLOP, MB."""
    torch.manual_seed(0)
    model = models.build("vit_b16", 100)
    methods.adapt(model, method, options)
    model = loop.on_device(model, options.device).train()
    loader = batches.loader(pictures, options, shuffle=True)
    images, labels = next(iter(loader))
    images = batches.prepare(images, options.device)

    def loss_of(_, batch: tuple) -> Tensor:
        images, labels = batch
        outputs = model(batches.prepare(images, options.device)).float()
        return batches.factor_loss(outputs, labels, [100])

    def epoch() -> float:
        return loop.fit(model, loader, loss_of, None, options, note=method)[-1]["seconds"]

    def forward_and_backward() -> None:
        for _ in range(len(loader)):
            with torch.autocast(options.device.type, torch.bfloat16, enabled=options.amp):
                outputs = model(images).float()
            batches.factor_loss(outputs, labels, [100]).backward()
            model.zero_grad()

    with FlopCounterMode(display=False) as counter:
        batches.factor_loss(model(images).float(), labels, [100]).backward()
    model.zero_grad()
    loop.peak_memory(options.device, start=True)
    epoch()  # a first one allocates
    memory = loop.peak_memory(options.device)
    times = [(epoch(), seconds(forward_and_backward, options.device)) for _ in range(rounds)]
    whole, inner = map(statistics.median, zip(*times))
    rest = statistics.median(1 - own / all_ for all_, own in times)  # of two beside each other
    flops = counter.get_total_flops() * len(loader)
    trained = methods.count(model)[0]
    return dict(whole=whole, inner=inner, rest=rest, flops=flops, memory=memory, trained=trained)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    a @ a
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--model", nargs="+", default=list(MODELS), choices=MODELS)
    add("--full-size", action="store_true", help="ViT-B/16 at 224 px in place of --model")
    add("--depth", type=int, default=4, help="blocks; ViT-B/16 has 12")
    add("--batch-size", type=int, default=8)
    add("--rounds", type=int, default=15)
    add("--steps", type=int, default=50, help="of --full-size, a round")
    add("--device", default="auto")
    add("--amp", action="store_true", help="bfloat16 autocast")
    args = p.parse_args()
    if min(args.depth, args.batch_size, args.rounds, args.steps) < 1:
        p.error("--depth, --batch-size, --rounds and --steps must be above 0")
    try:
        device = loop.pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    if args.full_size:
        return full_size(args, device)
    for name in args.model:
        report(name, args, device)


if __name__ == "__main__":
    main()
