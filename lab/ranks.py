"""One run in several processes, its ranks, as torchrun starts them: what they share, who speaks.

Every rank draws the same batches from the same seed and learns its own rows of each; the gradients
are summed, so that a step is that of one process but for rounding. Batches to score are dealt out
whole. The first rank alone writes and prints. Without torchrun there is one rank, and nothing here
does anything. [us] our choice, as in san.py.
"""

import atexit
import contextlib
import itertools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(days=1)  # a rank may download or score for long; torchrun sees when one ends
_STORE = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def number() -> int:
    """Which rank this process is; 0 is the first."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many ranks the run has, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def here() -> tuple[int, int]:
    """The rank's number on its own machine, and how many ranks that has."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def command() -> list[str]:
    """How the run was started, up to the script."""
    return ["torchrun", f"--nproc_per_node={here()[1]}"] if count() > 1 else ["python"]


def gpu(name: str) -> str:
    """What "cuda" means to this rank: a GPU of its own, if there are enough. Raises ValueError."""
    if count() == 1 or not torch.cuda.is_available():
        return name
    if name != "cuda":
        raise ValueError(f"--device {name} is one GPU for all ranks; leave its number out")
    own = here()[0] % torch.cuda.device_count()
    torch.cuda.set_device(own)  # else pinned memory has every rank on the first GPU as well
    return f"cuda:{own}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In it, no rank but the first prints: no line, no bar, no warning."""
    with contextlib.ExitStack() as stack:
        if number():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In it, the ranks are one group, and `quiet`. If one raises, it ends for all of them.

    What is raised first is raised; the ranks that this stops in what they do together end without
    a word. Ctrl-C reaches all of them, and the first rank raises it.
    """
    if count() == 1 or dist.is_initialized():
        yield
        return
    nccl = torch.cuda.device_count() >= here()[1]  # it wants a GPU for every rank
    atexit.register(leave)  # registered first, it comes after all others
    try:
        with quiet(), together():
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
            yield
            dist.destroy_process_group()
    except BaseException as error:
        atexit.unregister(leave)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another
        if number() if isinstance(error, KeyboardInterrupt) else failed_before():
            sys.exit(1)
        raise


def leave() -> None:
    """End the process with 0 before Python is taken apart.

    gloo's and autograd's threads may want Python even then, and abort the process (PyTorch's issue
    190489): torchrun would call a run failed that has written all its files.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def say(sentence: str) -> None:
    """To stderr, below the first rank's bar: in one piece, as that may go on meanwhile."""
    print("\n" * (number() > 0) + sentence + "\n", end="", file=sys.stderr)


def failed_before() -> int:
    """How many ranks have said already that they failed; torchrun's own store counts them."""
    address, port, start = map(os.environ.get, _STORE)
    try:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(minutes=1))
        return store.add(f"failed in start {start}", 1) - 1
    except RuntimeError:  # it has ended itself; rather twice than not at all
        return 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In it, what all ranks do at once, FSDP2 too. Raises OSError if one of them is lost."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        said = re.sub(r"^\[\S+\] ", "", str(error).partition(". ")[0])
        raise OSError(f"a rank was lost, and the run ends with it: {said}") from error


@contextlib.contextmanager
def first_here() -> Iterator[None]:
    """In it, a machine's first rank goes before the others: it downloads what they then find."""
    if here()[0]:
        total(0)
    yield
    if not here()[0]:
        total(0)


def own(rows: Sequence) -> Sequence:
    """This rank's rows of a batch, every count()-th."""
    return rows[number() :: count()]


def collate(into: Callable[[list], Sequence], rows: list) -> Sequence:
    """A batch of this rank's `own` rows, of which `into` makes it; () where it has none."""
    mine = own(rows)
    return into(mine) if mine else ()


def cut(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The `own` rows of a batch that is there already; () where this rank has none."""
    return tuple(map(own, batch)) if len(batch[0]) > number() else ()


def dealt(batches: Iterable, model: Any = None) -> Iterator:
    """Every count()-th of some batches, whole: its outputs are bit for bit those of one process.

    All of them where the model is sharded: its ranks have to go through it together.
    """
    start, step = (0, 1) if is_sharded(model) else (number(), count())
    return itertools.islice(batches, start, None, step)


def collected(mine: list, model: Any = None) -> list:
    """What all ranks made of the batches `dealt` to them, one entry each, in the batches' order."""
    if count() == 1 or is_sharded(model):
        return mine
    every: list[Any] = [None] * count()
    dist.all_gather_object(every, mine)
    turns = itertools.zip_longest(*every, fillvalue=every)
    return [entry for turn in turns for entry in turn if entry is not every]


def total(*numbers: float) -> list[float]:
    """The sum over all ranks of each number."""
    if count() == 1:
        return [*numbers]
    sums = torch.tensor(numbers)
    dist.all_reduce(sums)
    return sums.tolist()


def add_up(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Put the sum over all ranks in place of the loss, and of every gradient, in one all-reduce.

    A gradient that a rank lacks counts as 0. DistributedDataParallel would want what it does not
    get: a loss that comes out of the model's own forward, and every parameter in every rank's part
    of it. A rank may have no row, and a LLaVA's rows no picture. Of what is sharded FSDP2 has
    already taken the mean over the ranks, of which a sum is made. [us]
    """
    if count() == 1:
        return
    shares = [loss]
    for parameter in parameters:
        if not hasattr(parameter, "full_tensor"):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            shares.append(parameter.grad)
        elif parameter.grad is not None:
            parameter.grad *= count()
    sums = torch.cat([share.flatten().float() for share in shares])
    dist.all_reduce(sums)
    for share, summed in zip(shares, sums.split([share.numel() for share in shares])):
        share.copy_(summed.view_as(share))


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The LLaMA itself, of whose every weight a rank keeps its part alone: FSDP2.

    A block is gathered while it computes; what is outside of the blocks, from a forward pass to the
    end of its backward pass, so that the head can be called by itself. The model is adapted before,
    and on the CPU: it goes to the device block by block. All ranks then have to go through it as
    often. Raises ValueError where ranks would share a GPU.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if device.type == "cuda" and torch.cuda.device_count() < here()[1]:
        raise ValueError("--shard takes a GPU for every rank; start fewer, or give --device cpu")
    # a block's keys and values are views; nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = dist.init_device_mesh(device.type, (count(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "features")
    return model


def is_sharded(model: Any) -> bool:
    return hasattr(model, "reshard")


def gathered(values: Any) -> Any:
    """Dicts of any depth, each sharded tensor in them whole on the first rank's CPU, else empty.

    All ranks call it, with one tensor after another in their memory.
    """
    if isinstance(values, dict) and count() > 1:
        return {key: gathered(value) for key, value in values.items()}
    if not hasattr(values, "full_tensor"):
        return values
    whole = values.full_tensor()
    return torch.empty(0) if number() else whole.cpu()


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in shards as `like` is, if it is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
