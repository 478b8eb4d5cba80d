"""lab/loop.py: what a training loop does that no whole run shows."""

import itertools
import json
import os
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import san
from lab import loop


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [loop.rate_at(step, steps=100, warmup=10, peak=1.0) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3


def test_the_average_counts_every_step_less_than_the_next():
    def train(average: float) -> tuple[nn.Linear, list[torch.Tensor]]:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
        model, before = nn.Linear(3, 1), []

        def loss_of(model: nn.Linear, batch: tuple) -> torch.Tensor:
            before.append(model.weight.detach().clone())
            return (model(batch[0]) - batch[1]).square().mean()

        args = Namespace(epochs=2, warmup_epochs=0, lr=0.1, weight_decay=0, seed=0, amp=False)
        loop.fit(model, DataLoader(data, 4), loss_of, None, args, average=average)
        return model, before

    last, before = train(average=0.0)
    after = [*before[1:], last.weight.detach()]  # each of the six steps
    mean = after[0]
    for weight in after[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(train(average=0.5)[0].weight.detach(), mean)
    assert not torch.allclose(mean, last.weight)


class Killed(BaseException):
    """A process that ends before a file operation: nothing after it is done, not even clean-up."""


def run_until(stop: int, out: Path, name: str, monkeypatch) -> bool:
    """A run of no training, killed before its file operation number `stop`; was it?"""
    done = itertools.count()

    def killing(function):
        def operation(*args, **kwargs):
            if next(done) >= stop:
                raise Killed
            return function(*args, **kwargs)

        return operation

    args = Namespace(resume=False, name=name, method="san", out=str(out), device="cpu")
    model, result = nn.Sequential(nn.Linear(2, 2)), {"method": "san", "name": name}
    san.attach(model, [san.Link("0")])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(Path, "unlink", killing(Path.unlink))
        try:
            loop.begin(args, out)
            (out / "checkpoint.pt").write_bytes(b"")
            score = torch.zeros(3, 2), {"test": 0.5}
            loop.conclude(model, args, [], result, lambda _: score, {"name": name})
        except Killed:
            return True
    return False


def test_a_runs_folder_is_one_run_whenever_it_is_killed(tmp_path, monkeypatch):
    stops = 0
    for stop in itertools.count():
        out = tmp_path / str(stop)
        assert not run_until(100, out, "old", monkeypatch)
        killed = run_until(stop, out, "new", monkeypatch)
        own = json.loads((out / "config.json").read_text())["name"]
        if (out / "merged.pt").exists():  # finished: with its own settings and its own history
            assert san.read(out / "merged.pt")["name"] == own
            assert json.loads((out / "metrics.jsonl").read_text())["name"] == own
        else:
            assert killed
        if not killed:
            break
        stops += 1
    assert stops == 8 and own == "new"


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=own: order.append(n) or f(*a))
    san.write({"a": 1}, tmp_path / "file.pt")
    loop.write_text("text", tmp_path / "file.txt")
    assert order == ["fsync", "replace"] * 2
