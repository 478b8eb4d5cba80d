"""How the tests run a training script and read what it leaves behind."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import san


def command_of(script: ModuleType) -> Callable[..., int]:
    """What runs train_vision or train_lm in this process, with words, and gives its exit code."""

    def command(*words) -> int:
        before = sys.argv
        sys.argv = [f"{script.__name__}.py", *map(str, words)]
        try:
            script.main()
        except SystemExit as stop:
            return stop.code or 0
        finally:
            sys.argv = before
        return 0

    return command


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    timed = {"seconds", "images_per_second", "questions_per_second", "wall", "memory"}
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def stop_after(epochs: int, monkeypatch) -> None:
    """Press Ctrl-C when that many epochs have been checkpointed."""
    write, count = san.write, []

    def write_and_stop(content, path, save=None):
        write(content, path, save)
        count.extend([path] if path.name == "checkpoint.pt" else [])
        if len(count) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(san, "write", write_and_stop)


def require_same_end_after_stop(
    command: Callable[..., int], flags: list, folder: Path, monkeypatch
) -> None:
    """A run of three epochs, stopped after two and resumed, is one that was never stopped."""
    flags = [*flags, "--epochs", 3]
    assert command(*flags, "--out", folder / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert command(*flags, "--out", folder / "parts") == 130
    assert command(*flags, "--out", folder / "parts", "--resume") == 0
    outs = (folder / "whole", folder / "parts")
    whole, parts = (without_times(metrics(out)) for out in outs)
    assert whole == parts
    name = "model.pt" if (outs[0] / "model.pt").exists() else "merged.pt"
    whole, parts = (san.read(out / name)["state_dict"] for out in outs)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
