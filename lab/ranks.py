"""One run in several processes, its ranks, as torchrun starts them: what they share, who speaks.

Every rank draws the same batches from the same seed and learns its own rows of each; the gradients
are summed, so that a step is that of one process but for rounding. Batches to score are dealt out
whole. The first rank alone writes and prints. Without torchrun there is one rank, and nothing here
does anything. [us] our choice, as in san.py.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
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
    try:
        with quiet():
            with together():
                backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)
            yield
            dist.destroy_process_group()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another
        if number() if isinstance(error, KeyboardInterrupt) else failed_before():
            sys.exit(1)
        if number():
            print(file=sys.stderr)  # below the first rank's bar
        raise


def failed_before() -> int:
    """How many ranks have said already that they failed; torchrun's own store counts them."""
    address, port, start = map(os.environ.get, _STORE)
    try:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"failed in start {start}", 1) - 1
    except RuntimeError:  # it has ended itself
        return number()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In it, what all ranks do at once. Raises OSError if one of them is lost."""
    try:
        yield
    except RuntimeError as error:
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


def dealt(batches: Iterable) -> Iterator:
    """Every count()-th of some batches, whole: its outputs are bit for bit those of one process."""
    return itertools.islice(batches, number(), None, count())


def collected(mine: list) -> list:
    """What all ranks made of the batches `dealt` to them, one entry each, in the batches' order."""
    if count() == 1:
        return mine
    every: list[Any] = [None] * count()
    with together():
        dist.all_gather_object(every, mine)
    turns = itertools.zip_longest(*every, fillvalue=every)
    return [entry for turn in turns for entry in turn if entry is not every]


def total(*numbers: float) -> list[float]:
    """The sum over all ranks of each number."""
    if count() == 1:
        return [*numbers]
    sums = torch.tensor(numbers)
    with together():
        dist.all_reduce(sums)
    return sums.tolist()


def add_up(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Put the sum over all ranks in place of the loss, and of every gradient, in one all-reduce.

    A gradient that a rank lacks counts as 0. DistributedDataParallel would want what it does not
    get: a loss that comes out of the model's own forward, and every parameter in every rank's part
    of it. A rank may have no row, and a LLaVA's rows no picture. [us]
    """
    if count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    shares = [loss, *(parameter.grad for parameter in parameters)]
    sums = torch.cat([share.flatten().float() for share in shares])
    with together():
        dist.all_reduce(sums)
    for share, summed in zip(shares, sums.split([share.numel() for share in shares])):
        share.copy_(summed.view_as(share))
