"""san.py on two gloo processes: DDP and FSDP2 train what one process trains on the whole batch."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import san
from san import Link

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
RANKS, STEPS = 2, 3


class Block(nn.Module):
    """x + fc2(GELU(fc1(x)))."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


def adapted() -> nn.Module:
    """Two blocks, with a link from the first to the second, and a head that is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    links = [Link("0.fc1"), Link("0.fc2", "0.fc1"), Link("1.fc1", "0.fc2"), Link("1.fc2", "1.fc1")]
    san.attach(model, links, shift=True, trainable=["2"])
    return model


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def batch() -> Tensor:
    return torch.randn(4 * RANKS, 8, generator=torch.Generator().manual_seed(1))


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))  # its own would be of GPUs where there are any
    for block in model[:2] if kind == "fsdp2 per block" else ():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, kind: str, folder: Path) -> None:
    """One process: train on its share of the batch, save the adapter, merge, keep the output."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = wrapped(kind, adapted())
    train(model, batch().chunk(RANKS)[rank])
    san.save_adapter(model, folder / f"{rank}.pt")
    before = model(batch())
    san.merge(model)
    if kind != "ddp":
        model.reshard()  # FSDP2 throws away what is not in its shards
    torch.save((before, model(batch())), folder / f"outputs{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may abort a Python that takes itself apart: ranks.leave


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 per block"])
def test_two_processes_train_save_and_merge_what_one_does(kind, tmp_path):
    if kind != "ddp":
        pytest.importorskip("torch.distributed.fsdp", reason="FSDP2")
    torch.multiprocessing.spawn(work, (kind, tmp_path), nprocs=RANKS)
    alone = adapted()
    base = copy.deepcopy(alone)
    san.detach(base)
    train(alone, batch())
    for rank in range(RANKS):
        model = copy.deepcopy(base)
        san.load_adapter(model, tmp_path / f"{rank}.pt")
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, msg=f"{rank}: {name}")
        before, merged = torch.load(tmp_path / f"outputs{rank}.pt")
        torch.testing.assert_close(before, alone(batch()))
        torch.testing.assert_close(merged, before)
