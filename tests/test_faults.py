"""What breaks from outside: files, disks, memory, two runs at once. faults.py counts, here briefly.

The long count: python tests/faults.py --files 200 --kills 20
"""

import argparse
import io
import json
import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import faults
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

import san
import train_lm
import train_vision
from lab import folders, loop, pictures, saved, tables

pytestmark = pytest.mark.usefixtures("one_thread")
NEEDS = {"gguf": "gguf", "tokenizer.json": "tokenizers", "model.safetensors": "safetensors"}
NEEDS |= {"a LLaMA's config.json": "safetensors"}


@pytest.mark.parametrize("name", faults.FORMATS)
def test_a_broken_file_is_refused_in_one_sentence_or_read(name):
    for package in {NEEDS.get(name, "torch"), "tokenizers" if name in NEEDS else "torch"}:
        pytest.importorskip(package)
    found = faults.count(name, files=4)
    outcomes = {what for counter in found.values() for what in counter}
    assert outcomes <= {"read", "refused"}
    assert found["truncated"]["refused"] or name in ("questions", "metrics.jsonl", "results.jsonl")


def test_the_count_finds_what_is_no_sentence(tmp_path):
    path = tmp_path / "file"
    path.write_text("")

    def says(error: BaseException) -> str:
        def read() -> None:
            raise error

        return faults.outcome(read, path, tmp_path)

    assert says(OSError(f"{path} is broken")) == "refused"
    assert says(OSError("it is broken")).startswith("not named")
    assert says(ValueError(f"{path}\nis broken")).startswith("not one sentence")
    assert says(KeyError("a")) == "KeyError: 'a'"
    made = faults.outcome(lambda: (tmp_path / "new").touch(), path, tmp_path)
    assert made == "read, and files changed"


# ------------------------------------------------------------------------------ two runs, one --out


def refused(out: Path, shared: bool) -> bool:
    try:
        with loop.holding(out, shared):
            return False
    except OSError as error:
        assert str(error) == f"another run is writing into {out}; choose another --out"
        return True


def test_a_run_has_its_folder_alone_and_comparisons_share_one(tmp_path):
    with loop.holding(tmp_path):
        assert refused(tmp_path, shared=False) and refused(tmp_path, shared=True)
    with loop.holding(tmp_path, shared=True):
        assert refused(tmp_path, shared=False) and not refused(tmp_path, shared=True)
    assert not refused(tmp_path, shared=False)
    assert not list(tmp_path.iterdir())  # no file is left


def test_a_killed_run_leaves_its_folder_free(tmp_path):
    def hold() -> int:
        with loop.holding(tmp_path / "run"):
            (tmp_path / "held").touch()
            time.sleep(600)
        return 0

    number = faults.in_a_process(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert refused(tmp_path / "run", shared=False)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    assert not refused(tmp_path / "run", shared=False)


@pytest.mark.parametrize("words", [[], ["--compare"]])
def test_the_second_run_with_the_same_out_is_refused_and_changes_nothing(words, tmp_path, capsys):
    data, out = faults.picture_folder(tmp_path / "data"), tmp_path / "run"
    (out / "adapter.pt").parent.mkdir()
    for name in ("adapter.pt", "config.json"):
        (out / name).write_text("the first run's")
    words = ["--dataset", str(data), *faults.FLAGS, "--weights", "none", *words, "--out", str(out)]
    args = train_vision.arguments(words)
    with loop.holding(out), pytest.raises(SystemExit) as stop:
        loop.guard(train_vision.compare if args.compare else train_vision.run, args)
    assert stop.value.code == 1 and "another run is writing into" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
        ("adapter.pt", "config.json"), "the first run's"
    )


def test_what_is_given_makes_a_run_another_and_its_folder_too():
    def out(*words: str, script=train_vision) -> str:
        return script.arguments([*words]).out

    plain = "runs/sprites-shape-vit_micro-san-seed0"
    assert out() == out("--rank", "8") == out("--device", "cpu") == plain
    assert out("--task", "count") == "runs/sprites-count-vit_micro-san-seed0"
    assert out("--lr", "0.01", "--no-norms") == f"{plain}-norms=False-lr=0.01"
    assert out("--weights", "a/b.pt") == f"{plain}-weights=a_b.pt"
    assert out("--weights", "a/" + 200 * "b") != out("--weights", "a/" + 201 * "b")
    assert len(out("--weights", "a/" + 200 * "b")) < 200
    every = [[], ["--mode", "feature"], ["--gamma-std", "1"], ["--seed", "1"]]
    every += [["--method", "lora"], ["--method", "lora", "--rank", "4"], ["--pretrain"]]
    every += [["--method", "full"], ["--method", "full", "--weights", "none"], ["--shots", "50"]]
    every += [["--data-dir", "a"], ["--data-dir", "b"]]
    assert len({out(*words) for words in every}) == len(every)
    every = [[], ["--tasks", "piqa"], ["--tasks", "piqa", "boolq"], ["--dtype", "bfloat16"]]
    every += [["--tasks", "corpus"], ["--weights", "none"], ["--test-shots", "9"]]
    assert len({out(*words, script=train_lm) for words in every}) == len(every)
    for words in (["--compare"], ["--evaluate", "run"], ["--plot", "run"]):
        assert out(*words) is None


# ------------------------------------------------------------------------ what a file has to hold


@pytest.mark.parametrize("script", [train_vision, train_lm])
def test_every_flag_has_its_kind_and_a_runs_own_settings_are_of_it(script):
    args = vars(script.arguments([])) | {"device": "cpu", "amp": False, "lr": 0.1}
    assert args.keys() <= saved.CONFIG.keys()
    saved.require(args, saved.CONFIG.fromkeys(args) | {k: saved.CONFIG[k] for k in args})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, saved.COUNT),
        (0, saved.COUNT),
        (2.0, saved.COUNT),
        (10**400, saved.NUMBER),
        (float("nan"), saved.AMOUNT),
        (1.1, saved.SHARE),
        (None, saved.TEXT),
        ([], saved.TEXTS),
        (["a", 1], saved.TEXTS),
        ({1: 2}, saved.ENTRIES),
        ("9:AA", saved.HITS),
        ({"a": torch.ones(2).long()}, saved.STATE),
        ({"a": torch.full((2,), float("inf"))}, saved.STATE),
        ({"a": torch.eye(2).to_sparse()}, saved.STATE),
    ],
)
def test_a_value_of_another_kind_is_named(value, kind):
    with pytest.raises(ValueError, match=f"^'x' is .*, not {kind}$"):
        saved.require({"x": value}, {"x": kind})
    with pytest.raises(ValueError, match="^it has no 'x'$"):
        saved.require({}, {"x": kind})
    saved.require({}, {}, {"x": kind})
    saved.require({"x": None}, {"x": f"{kind} or null"})


@pytest.mark.parametrize("key", ["model", "optimizer", "mean"])
def test_a_checkpoint_of_other_shapes_or_without_a_parameter_is_refused(key, tmp_path):
    path, resume = faults.checkpoint(tmp_path)
    content = san.read(path)
    tensors = content[key]["state"] if key == "optimizer" else content[key]
    name, value = next((k, v) for k, v in tensors.items() if k not in ("n_averaged",))
    other = {"exp_avg": torch.zeros(1)} if key == "optimizer" else value.new_zeros(99)
    tensors[name] = value | other if key == "optimizer" else other
    san.write(content, path)
    with pytest.raises(OSError, match=f"checkpoint.pt is broken: '{key} {name}"):
        resume()
    del tensors[name]
    san.write(content, path)
    with pytest.raises(OSError, match=f"checkpoint.pt is broken: '{key} {name}"):
        resume()


def test_a_bit_that_changed_in_a_weight_is_noticed(tmp_path):
    san.write({"a": torch.ones(1000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes()) + 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(OSError, match="a.pt is broken or no torch file"):
        san.read(tmp_path / "a.pt")


# ---------------------------------------------------------------------------- disks and memory


@contextmanager
def full_disk(size: int):
    """In it, no file grows beyond a size, as on a disk that is full."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_said_as_the_system_says_it(tmp_path):
    with full_disk(10_000), pytest.raises(OSError, match="a.pt: .*File too large$"):
        san.write(torch.zeros(10_000), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_comparison_on_a_full_disk_names_its_file_and_keeps_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    line = {"task": "t", "model": "m", "method": "a", "part": "search", "lr": 1, "seed": 0}
    journal = tables.Journal(path, {})
    for _ in range(3):
        journal.add(line | {"val": 0.5})
    whole = path.read_bytes()
    with full_disk(len(whole) + 20), pytest.raises(OSError, match=f"could not write {path}: "):
        journal.add(line | {"val": 0.5})
    journal.add(line | {"val": 0.25})  # where there is room again, after what was cut off
    assert path.read_bytes().startswith(whole)
    assert [line["val"] for line in tables.read_results(path)] == [0.5] * 3 + [0.25]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a lot."),
        RuntimeError("[enforce fail at alloc.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_sentence_with_the_remedy(error, capsys, monkeypatch):
    def work(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["train_vision.py"])
    with pytest.raises(SystemExit) as stop:
        loop.guard(work, argparse.Namespace(device="cpu", amp=False))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert "no memory left" in said and "--batch-size" in said and "--accumulate" in said


def test_what_is_a_bug_stays_a_traceback():
    def work(args: argparse.Namespace) -> None:
        nn.Linear(2, 2)(torch.ones(3))

    with pytest.raises(RuntimeError, match="shapes"):
        loop.guard(work, argparse.Namespace(device="cpu", amp=False))


# ---------------------------------------------------------------------------------- pictures


class Published(Dataset):
    """A set that reads its pictures when asked, as torchvision's do; the last is broken."""

    def __init__(self, content: bytes):
        self.content = content

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if i < 2:
            return Image.new("RGB", (8, 8)), 0
        return Image.open(io.BytesIO(self.content)).convert("RGB"), 0


@pytest.mark.parametrize("how", ["bomb", "cut off", "text"])
def test_a_picture_of_a_published_set_is_named_by_its_place(how, monkeypatch):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    content = {"text": b"no picture", "cut off": buffer.getvalue()[:999]}.get(
        how, buffer.getvalue()
    )
    if how == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    some = pictures.Single(Subset(Published(content), [2, 0]), v2.PILToTensor())
    with pytest.raises(folders.Unreadable, match="^picture 2 of Published is not a picture"):
        some[0]
    assert some[1][0].shape == (3, 8, 8)


def test_json_that_is_too_deep_or_too_long_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text in ("[" * 100_000, json.dumps({"epochs": 1}).replace("1", "9" * 5000)):
        path.write_text(text)
        with pytest.raises(OSError, match="config.json is broken"):
            saved.config(tmp_path)
