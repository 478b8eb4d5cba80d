"""What a step costs, method by method: ratios of step times, measured in turn in one process.

    python -m lab.bench                          # a ViT, a ConvNeXt and a LLaMA, a table of each
    python -m lab.bench --compile --methods san  # with torch.compile beside; full and limit as well
    python -m lab.bench --full-size              # ViT-B/16 at 224 px: images/s, FLOP/s, memory
    python -m lab.bench --memory                 # what a step of LLaMA-7B and 8B would need

Speed is a ratio here, since machines differ and drift: every round times one step of each method
in turn, and what is printed is the median over rounds of the ratio within a round. The merged
model's forward is timed against the base model's in the same way.

limit: forward, and the gradient by what the model's first layer gives, no parameter's. Whatever
trains something in every layer computes these two. The first layer is a patch embedding, a stem or
an embedding; the gradient by the pixels before it nobody needs, and by a token there is none.

vit: ViT-B/16's width; convnext: ConvNeXt-T's widths; both at 224 px. llama: 1024 channels and 128
tokens. LoRA acts on the linked layers at rank 8, in a LLaMA on methods.LOW_RANK at rank 32, as in
the papers' language results, and DoRA on the same. PEFT's LoRA acts on the linear ones of these,
PEFT's IA³ on all linked linear layers.
--full-size goes through train_vision's training loop and data path, with pictures of CIFAR's
size.
"""

import argparse
import copy
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import models
from lab import batches, loop, methods, tables


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def in_turn(
    functions: dict[str, Callable[[], None]], device: torch.device, rounds: int
) -> Callable[[str, str], float]:
    """Time one call of each function, `rounds` times over.

    What is returned is ratio(name, against): the median over rounds of one's time divided by
    another's in the same round.
    """
    for function in functions.values():
        function()  # a first call allocates, or compiles
    times = [{name: seconds(f, device) for name, f in functions.items()} for _ in range(rounds)]
    return lambda name, against: statistics.median(t[name] / t[against] for t in times)


# ------------------------------------------------------------------------------ methods in a table


def vit(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, its inputs and their labels."""
    model = models.ViT(100, 224, patch=16, dim=768, depth=depth, heads=12)
    return model, torch.randn(batch, 3, 224, 224), torch.randint(100, (batch,))


def convnext(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of a ConvNeXt with `depth` blocks in its third stage and one in each other."""
    depths, dims = (1, 1, depth, 1), (96, 192, 384, 768)
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model = models.ConvNeXt(100, 224, depths, dims, drop_path=0.0)
    return model, images, torch.randint(100, (batch,))


def llama(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of a language model; a token's label is the token after it."""
    size = dict(dim=1024, depth=depth, heads=16, kv_heads=4, hidden=2816, context=128)
    tokens = torch.randint(1000, (batch, 129))
    return models.LLaMA(1000, **size), tokens[:, :-1], tokens[:, 1:]


# name: what builds it, and the rank of LoRA and DoRA
MODELS = {"vit": (vit, 8), "convnext": (convnext, 8), "llama": (llama, 32)}
PEFT = ("PEFT's LoRA", "PEFT's IA³")
METHODS = ("limit", "full", "linear", "ssf", "san", "lora", "dora", *PEFT, "san+lora")

# the training scripts' flags as they are by default, for one epoch
OPTIONS = dict(wiring="san", mode="both", norms=True, gamma_std=0.0, seed=0, resume=False)
OPTIONS |= dict(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0.1, accumulate=1, alpha=None)


def adapt(model: nn.Module, method: str, options: argparse.Namespace) -> None:
    """As methods.adapt, also for PEFT's methods."""
    if method not in PEFT:
        return methods.adapt(model, method, options)
    import peft

    model.requires_grad_(False)
    is_llama = isinstance(model, models.LLaMA)
    linked = [link.layer for link in model.links()]
    linear = [name for name in linked if isinstance(model.get_submodule(name), nn.Linear)]
    low_rank = [name for name in linear if not is_llama or name.endswith(methods.LOW_RANK)]
    if method == "PEFT's LoRA":
        config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=low_rank)
    else:  # it scales what the last layer of an MLP reads, and what every other one gives
        last = [name for name in linear if name.endswith(methods.SECOND)]
        config = peft.IA3Config(target_modules=linear, feedforward_modules=last)
    peft.inject_adapter_in_model(config, model)
    if not is_llama:  # a new head is trained by every method
        model.head.requires_grad_(True)


def prepared(
    base: nn.Module, method: str, inputs: Tensor, options: argparse.Namespace
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A copy of the base made ready for a method, and what gives the inputs of a step."""
    model = copy.deepcopy(base)
    if method != "limit":
        adapt(model, method, options)
        return model, lambda: inputs
    model.requires_grad_(False)
    name = next(name for name, m in model.named_modules() if name and not any(m.children()))
    first = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    return model, lambda: first(inputs).requires_grad_()


def stepper(
    model: nn.Module, forward: Callable, read: Callable[[], Tensor], labels: Tensor, amp: bool
) -> Callable[[], None]:
    """A training step: forward (the model, or compiled), loss, backward and, if it trains, AdamW.

    read(): the inputs; labels: one class per row of the logits.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True) if parameters else None

    def step() -> None:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=amp):
            logits = forward(read()).flatten(0, -2)  # one row a picture or token
            loss = F.cross_entropy(logits, labels.flatten())
        model.zero_grad()
        loss.backward()
        if optimizer:
            optimizer.step()

    return step


def compiles(method: str, step: Callable[[], None]) -> bool:
    """Take a compiled step; say so where torch cannot compile the model as one graph."""
    try:
        step()
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"{method} is not compiled: {str(error).splitlines()[0]}")
        return False
    return True


def compare(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the table of one model, a row for each method, and what its merged model costs."""
    torch.manual_seed(0)
    build, rank = MODELS[name]
    options = argparse.Namespace(**OPTIONS, shift=name != "llama", rank=rank)
    base, inputs, labels = (x.to(device) for x in build(args.depth, args.batch_size))
    # torch would give up on a class of which it has compiled a few models
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = len(METHODS)
    rows = [m for m in METHODS if m in ("limit", "full", *args.methods)]
    rows = [m for m in rows if m != "san+lora" or name == "llama"]
    steps = {}
    for method in rows:
        model, read = prepared(base, method, inputs, options)
        steps[method] = stepper(model, model, read, labels, args.amp)
        if args.compile:
            forward = torch.compile(model, fullgraph=True, dynamic=False)
            step = stepper(model, forward, read, labels, args.amp)
            if compiles(method, step):
                steps[f"{method}, compiled"] = step
    ratio = in_turn(steps, device, args.rounds)

    def cell(method: str, against: str) -> str:
        return f"{ratio(method, against):.2f}" if method in steps and against in steps else "—"

    columns = [("step, × full", "", "full"), ("× limit", "", "limit")]
    if args.compile:
        columns += [("compiled, × full", ", compiled", "full")]
        columns += [("compiled, × compiled limit", ", compiled", "limit, compiled")]
    print(f"{name}: {args.depth} blocks, batch {args.batch_size}, {device}\n")
    print(
        tables.markdown(
            [
                {"method": m} | {head: cell(m + kind, other) for head, kind, other in columns}
                for m in rows
            ]
        )
    )
    merged = copy.deepcopy(base)
    methods.adapt(merged, "san", options)
    methods.fold(merged)
    assert methods.count(merged)[1] == methods.count(base)[1]
    with torch.no_grad():
        forwards = {"base": lambda: base(inputs), "merged": lambda: merged(inputs)}
        ratio = in_turn(forwards, device, 3 * args.rounds)("merged", "base")
    print(f"forward, merged {ratio:5.2f} × base, with as many parameters\n")


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
    timed = ("linear", "full", "lora", "ssf", "san")
    figures = {m: one_method(m, pictures, options, args.rounds) for m in timed}
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


# ------------------------------------------------------------------- the memory of a LLaMA's step

SMOLLM2 = "SmolLM2-135M"  # small enough to be measured beside
LLAMAS = {  # LLaMA's arguments, as the models' config.json say
    SMOLLM2: dict(
        vocab=49152, dim=576, depth=30, heads=9, kv_heads=3, hidden=1536, context=8192, tied=True
    ),
    "LLaMA-7B": dict(
        vocab=32000, dim=4096, depth=32, heads=32, kv_heads=32, hidden=11008, context=2048
    ),
    "LLaMA-3-8B": dict(
        vocab=128256, dim=4096, depth=32, heads=32, kv_heads=8, hidden=14336, context=8192
    ),
}
ANSWER = 16  # tokens at a text's end that are learned; the head reads them alone


def memory(args: argparse.Namespace, device: torch.device) -> None:
    """Print a Markdown table: the memory that a training step of LLaMAs needs, in 10⁹ bytes.

    What is trained is float32, and so is all of SmolLM2; other frozen weights are bfloat16. LoRA
    has rank 32. measured: in two steps by a process of its own, since none gives all of it back.
    """
    options = argparse.Namespace(**OPTIONS, shift=False, rank=32, amp=args.amp)
    print(f"batch {args.batch_size}, {args.length} tokens each, the last {ANSWER} learned\n")
    rows = []
    for name, config in LLAMAS.items():
        for method in ("san", "lora", "full"):
            wide = name == SMOLLM2 or method == "full"
            dtype = torch.float32 if wide else torch.bfloat16
            tokens = torch.randint(config["vocab"], (args.batch_size, args.length))
            parts = needs(config, method, dtype, tokens, options)
            again = parts.pop("activations, --recompute")
            least = sum(parts.values()) - parts["activations"] + again
            row = {"model": name, "method": method, "frozen weights": str(dtype).split(".")[1]}
            row |= {part: f"{size / 1e9:.2f}" for part, size in parts.items()}
            row |= {"sum": f"{sum(parts.values()) / 1e9:.2f}", "--recompute": f"{least / 1e9:.2f}"}
            if name == SMOLLM2:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    task = process.submit(measured, config, method, tokens, options, str(device))
                    row["measured"] = f"{task.result():.2f}"
            rows.append(row)
    print(tables.markdown(rows))


def needs(
    config: dict, method: str, dtype: torch.dtype, tokens: Tensor, options: argparse.Namespace
) -> dict[str, int]:
    """Bytes of a training step, part by part, by arithmetic: no weight is allocated.

    weights, with what the method adds; gradients, as many as are trained; optimiser: AdamW's two
    moments of each; activations: what autograd keeps, asked of a model two and three blocks deep,
    of which the last block is what every further one adds. With --recompute blocks keep their
    inputs, and one of them all.
    """

    def at_depth(depth: int) -> tuple[int, int, int]:
        """Bytes of the weights, of those that are trained, and of what autograd keeps."""
        model = unallocated(config | {"depth": depth}, dtype)
        methods.adapt(model, method, options)
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        whole, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        with FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone are computed
            return whole, trained, kept(model, tokens, options.amp)

    two, three = at_depth(2), at_depth(3)
    block = [more - less for less, more in zip(two, three)]
    weights, trained, activations = (
        own + (config["depth"] - 2) * each for own, each in zip(two, block)
    )
    inputs = tokens.numel() * config["dim"] * dtype.itemsize
    return {
        "weights": weights,
        "gradients": trained,
        "optimiser": 2 * trained,
        "activations": activations,
        "activations, --recompute": activations
        - (config["depth"] - 1) * block[2]
        + config["depth"] * inputs,
    }


def unallocated(config: dict, dtype: torch.dtype) -> models.LLaMA:
    """A LLaMA whose every weight is one zero, seen at all its places: shapes without memory."""
    with torch.device("meta"):
        model = models.LLaMA(**config)
    for module in model.modules():
        own = torch.float32 if isinstance(module, models.RMSNorm) else dtype
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.zeros((), dtype=own).expand(parameter.shape)
            setattr(module, name, nn.Parameter(value))
    if model.config["tied"]:
        model.head.weight = model.embed.weight
    return model


def answer_loss(model: models.LLaMA, tokens: Tensor, amp: bool) -> Tensor:
    """The loss of the last ANSWER tokens, whatever is to follow them."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=amp):
        logits = model.head(model.features(tokens)[:, -ANSWER:])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, -ANSWER:].flatten())


def kept(model: models.LLaMA, tokens: Tensor, amp: bool) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, the weights left out."""
    own = [tensor for p in model.parameters() for tensor in (p, p.detach())]  # in fake mode two
    weights, found = {tensor.untyped_storage()._cdata for tensor in own}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage  # held, so that no other one gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer_loss(model, tokens, amp)
    return sum(storage.nbytes() for number, storage in found.items() if number not in weights)


def measured(
    config: dict, method: str, tokens: Tensor, options: argparse.Namespace, device: str
) -> float:
    """By how many 10⁹ bytes memory grew at most while a model took two steps; random weights."""
    before = loop.peak_memory(torch.device(device), start=True)
    with torch.device(device):
        model = models.LLaMA(**config)
    methods.adapt(model, method, options)
    loop.peak_memory(torch.device(device), start=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    for _ in range(2):  # at the first, AdamW has no moments yet
        optimizer.zero_grad()
        answer_loss(model, tokens.to(device), options.amp).backward()
        optimizer.step()
    return (loop.peak_memory(torch.device(device)) - before) / 1e3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--model", nargs="+", default=list(MODELS), choices=MODELS)
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="beside limit and full")
    add("--compile", action="store_true", help="time torch.compile's steps as well")
    add("--full-size", action="store_true", help="ViT-B/16 at 224 px in place of --model")
    add("--depth", type=loop.positive, default=4, help="blocks; of a ConvNeXt its third stage's")
    add("--batch-size", type=loop.positive, default=4)
    add("--rounds", type=loop.positive, default=7)
    add("--steps", type=loop.positive, default=50, help="of --full-size, a round")
    add("--memory", action="store_true", help="of a LLaMA's step, in place of --model")
    add("--length", type=loop.positive, default=256, help="tokens, of --memory")
    add("--device", default="auto")
    add("--amp", action="store_true", help="bfloat16 autocast")
    args = p.parse_args()
    try:
        device = loop.pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    if args.full_size or args.memory:
        return (full_size if args.full_size else memory)(args, device)
    if not importlib.util.find_spec("peft"):
        args.methods = [method for method in args.methods if method not in PEFT]
        print("PEFT's LoRA and IA³ are left out; to have them: pip install peft\n")
    for name in args.model:
        compare(name, args, device)


if __name__ == "__main__":
    main()
