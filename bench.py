"""What a SAN step costs: ratios of step times, measured in turn in one process.

    python bench.py                 # a ViT, then a LLaMA, each as wide as a real one
    python bench.py --model llama   # one of them

vit: ViT-B/16's width and 224 px. llama: 1024 channels and 128 tokens, LoRA and DoRA of rank 32 on
the layers of LLaMA.LOW_RANK, as in the papers' language results.
Speed is a ratio here, since machines differ and drift: every round times one step of each method
in turn, and the median over rounds of the ratio to full fine-tuning is what is printed. The
merged model is timed against the base model in the same way.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import tuning


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


def report(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the ratios of one model."""
    torch.manual_seed(0)
    build, rank, methods = MODELS[name]
    options = argparse.Namespace(wiring="exact", mode="both", shift=name == "vit", rank=rank)
    base, inputs, labels = (x.to(device) for x in build(args.depth, args.batch_size))

    def stepper(method: str):
        model = copy.deepcopy(base)
        tuning.adapt(model, method, options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = model(inputs).flatten(0, -2)  # one row a picture or token
                loss = F.cross_entropy(logits, labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    merged = copy.deepcopy(base)
    tuning.adapt(merged, "san", options)
    tuning.fold(merged)
    assert tuning.count(merged)[1] == tuning.count(base)[1]

    print(f"{name}: {args.depth} blocks, batch {args.batch_size}, {device}")
    steps = in_turn({m: stepper(m) for m in methods}, device, args.rounds, "full")
    for method, ratio in steps.items():
        print(f"step, {method:<9}{ratio:5.2f} × full   {ratio / steps['lora']:5.2f} × lora")
    with torch.no_grad():
        forwards = {"base": lambda: base(inputs), "merged": lambda: merged(inputs)}
        ratio = in_turn(forwards, device, 3 * args.rounds, "base")["merged"]
    print(f"forward, merged {ratio:5.2f} × base, with as many parameters")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    p.add_argument("--depth", type=int, default=4, help="blocks; ViT-B/16 has 12")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--device", default="auto")
    p.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = p.parse_args()
    if min(args.depth, args.batch_size, args.rounds) < 1:
        p.error("--depth, --batch-size and --rounds must be above 0")
    try:
        device = tuning.pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    for name in args.model:
        report(name, args, device)


if __name__ == "__main__":
    main()
