"""lab/loop.py: what a training loop does that no whole run shows."""

import copy
import itertools
import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import models
import san
import train_lm
import train_vision
from lab import loop, methods, questions, tables


def args_for(**changes) -> Namespace:
    args = dict(epochs=2, warmup_epochs=0, lr=0.1, weight_decay=0, seed=0, amp=False, accumulate=1)
    return Namespace(**args | changes)


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

        loop.fit(model, DataLoader(data, 4), loss_of, None, args_for(), average=average)
        return model, before

    last, before = train(average=0.0)
    after = [*before[1:], last.weight.detach()]  # each of the six steps
    mean = after[0]
    for weight in after[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(train(average=0.5)[0].weight.detach(), mean)
    assert not torch.allclose(mean, last.weight)


@pytest.mark.parametrize("method", sorted({*train_vision.METHODS, *train_lm.METHODS, "projector"}))
def test_an_epochs_line_fits_100_columns_and_tells_what_people_look_at(method):
    record = {"epoch": 1000, "loss": 2.3e30, "val": 1.0, "seconds": 1.0}
    for unit in ("images", "questions", "windows"):
        line = loop.in_short(record | {f"{unit}_per_second": 99999.9}, unit, 999 * 3600)
        assert len(f"{method} epoch 1000/1000  {line}") <= 100
    record |= {"loss": 0.6931, "val": None, "images_per_second": 0.42}
    assert loop.in_short(record, "images", 0) == "loss 0.6931  0.4 images/s"
    record["val"] = 0.881
    said = "loss 0.6931  validation 88.1 %  0.4 images/s  2 min left"
    assert loop.in_short(record, "images", 100) == said


def test_an_epochs_line_tells_how_long_the_others_take(tmp_path, monkeypatch, capsys):
    times = itertools.count()  # an epoch asks three times: 1 s of training, 2 s in all
    monkeypatch.setattr(loop, "time", Namespace(perf_counter=lambda: next(times)))
    data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))

    def loss_of(model: nn.Linear, batch: tuple) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    args = args_for(resume=False, epochs=3, lr=1e-3)
    loop.fit(nn.Linear(3, 1), DataLoader(data, 4), loss_of, lambda _: 0.5, args, tmp_path, "san")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines] == [f"san epoch {i}/3  " for i in (1, 2, 3)]
    ends = ["  4 s left", "  2 s left", ""]
    assert [line.partition("12.0 images/s")[2] for line in lines] == ends
    assert all("  validation 50.0 %  " in line and "loss " in line for line in lines)


def test_a_duration_is_told_in_its_own_unit():
    said = [loop.duration(seconds) for seconds in (0.4, 60, 90, 3600, 3601, 360_000)]
    assert said == ["0 s", "60 s", "2 min", "60 min", "1.0 h", "100.0 h"]


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

    args = Namespace(resume=False, name=name, method="san", out=str(out), device="cpu", log=None)
    model, result = nn.Sequential(nn.Linear(2, 2)), {"method": "san", "name": name}
    san.attach(model, [san.Link("0")])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(Path, "unlink", killing(Path.unlink))
        try:
            with loop.begin(args, out):
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


SIZES = {  # a small one of each backbone
    "vit": lambda: models.ViT(3, 8, patch=4, dim=12, depth=2, heads=2),
    "convnext": lambda: models.ConvNeXt(3, 8, (1, 2), (6, 8), drop_path=0.3, patch=2),
    "swin": lambda: models.Swin(3, 8, 2, 2, 8, (2, 1), (2, 2), drop_path=0.3),
    "llama": lambda: models.LLaMA(9, 8, depth=2, heads=2, kv_heads=1, hidden=12, context=16),
}
OPTIONS = dict(
    wiring="san", mode="both", norms=True, gamma_std=0.1, rank=2, shift=False, prompts=2, alpha=None
)


def adapted(name: str, method: str) -> tuple[nn.Module, torch.Tensor]:
    """An adapted model and an input of five."""
    torch.manual_seed(0)
    model = SIZES[name]()
    methods.adapt(model, method, Namespace(**OPTIONS))
    return model, torch.randint(9, (5, 6)) if name == "llama" else torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "san") for name in SIZES), ("llama", "san+dora"), ("vit", "vpt"), ("vit", "full")],
)
def test_recomputing_gives_the_same_gradients_runs_blocks_twice_and_leaves_nothing(name, method):
    model, inputs = adapted(name, method)
    blocks = [module for module in model.modules() if isinstance(module, loop.BLOCKS)]
    norms, runs = [next(m for m in b.modules() if "Norm" in type(m).__name__) for b in blocks], []
    for norm in norms:
        norm.register_forward_hook(lambda *_: runs.append(1))

    def gradients() -> dict:
        runs.clear()
        model.zero_grad()
        torch.manual_seed(1)  # of the branches that are dropped
        model(inputs).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected, once = gradients(), len(runs)
    with loop.recomputing(model):
        found = gradients()
        assert len(runs) == 2 * once == 2 * len(blocks) > 0
        state = model.state_dict().keys()
        copied = copy.deepcopy(model)
    torch.testing.assert_close(found, expected)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    assert state == model.state_dict().keys()
    gradients()
    assert len(runs) == once
    with torch.no_grad():  # an average is such a copy: it has its own weights
        assert torch.equal(copied.eval()(inputs), model.eval()(inputs))
        for block in (module for module in copied.modules() if isinstance(module, loop.BLOCKS)):
            for parameter in block.parameters():
                parameter *= 1.1
        assert not torch.equal(copied(inputs), model(inputs))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_a_batch_in_parts_makes_the_same_steps(parts):
    def train(accumulate: int) -> tuple[dict, list[dict], list[int]]:
        model, sizes = adapted("llama", "san")[0], []
        lengths = [3, 9, 4, 12, 5, 7, 6]  # so that parts have unequal numbers of labels
        pairs = [([1 + i % 8 for i in range(n)], 2) for n in lengths]
        loader = DataLoader(pairs, 5, collate_fn=questions.collate)

        def loss_of(model: nn.Module, batch: tuple) -> torch.Tensor:
            sizes.append(len(batch[0]))
            return questions.token_loss(model, *batch)

        def weigh(batch: tuple) -> int:
            return (batch[1] != questions.IGNORE).sum().item()

        args = args_for(lr=1e-3, accumulate=accumulate)
        history = loop.fit(model, loader, loss_of, None, args, weigh=weigh)
        return methods.trained_state(model), [record["loss"] for record in history], sizes

    whole, parted = train(1), train(parts)
    torch.testing.assert_close(parted[0], whole[0], atol=1e-6, rtol=1e-4)
    assert parted[1] == pytest.approx(whole[1], rel=1e-5)
    assert whole[2] == [5, 2] * 2 and max(parted[2]) == -(-5 // parts)
    assert sum(parted[2]) == sum(whole[2])


def test_lines_and_checkpoints_from_before_a_flag_count_as_made_with_its_default(tmp_path):
    line = {
        "task": "t",
        "model": "m",
        "method": "san",
        "part": "search",
        "lr": 1,
        "seed": 0,
        "val": 1,
    }
    old = {"epochs": 2}
    loop.write_json_lines([line | {"options": old}], tmp_path / "results.jsonl")
    for options, count in (
        (old | {"accumulate": 1, "recompute": False}, 1),
        (old | {"accumulate": 2}, 0),
        (old | {"ask": "words"}, 0),
        (old | {"alpha": None}, 1),
        (old | {"alpha": 16.0}, 0),
    ):
        journal = tables.Journal(tmp_path / "results.jsonl", options)
        assert len(journal.find({"method": "san"})) == count
    journal.add(line)
    again = tables.Journal(tmp_path / "results.jsonl", options)
    assert len(again.find({"method": "san"})) == 1 and len(again.lines) == 2


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_a_saved_run_asks_for_in_vain_names_its_config(kind, tmp_path):
    with pytest.raises(kind, match=r"^there is no set; so .*config\.json has it$"):
        with loop.as_saved_in(str(tmp_path)):
            raise kind("there is no set")
