"""Files broken at random, and runs killed at random: how does each end? Counts, as a table.

    python tests/faults.py                       # 20 files of each kind of damage, no kills
    python tests/faults.py --files 200 --kills 20

A broken file is read by what reads it in a run. It may be read all the same, as where a text became
another; else one sentence of one line has to refuse it (OSError, or ValueError for what the user
named), and nothing may be written. All else counts as a fault: another exception, a message without
the file's name or of several lines, an answer after more than LONGEST seconds, a crash.
"""

import argparse
import collections
import copy
import io
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from asking import save_as_run

import models
import san
import train_lm
import train_vision
from lab import folders, llama, loop, methods, microworld, plot, questions, tables

LONGEST = 20
WRONG = [
    *(None, True, -1, 0, 3, 10**9, 10**400, 0.5, -2.5, float("nan"), float("inf"), "", "text"),
    *([], {}, ["a", 1], {"a": {"b": 1}}, [[[]]], "x" * 5000, "two\nlines", "\ud800"),
]
WRONG_TENSORS = [
    *(torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4, 5)),
    *(torch.full((2, 2), float("nan")), torch.ones(2, dtype=torch.long), torch.ones(2).bool()),
    *(torch.ones(2, dtype=torch.cfloat), torch.eye(3).to_sparse(), torch.empty(2, device="meta")),
]

# --------------------------------------------------------------------------- a file of each format


def small(seed: int = 0) -> models.ViT:
    torch.manual_seed(seed)
    return models.ViT(2, 32, patch=16, dim=8, depth=1, heads=2)


def picture_folder(root: Path, kind: str = "png") -> Path:
    """Two classes, five pictures to train on and three to test with, of 32 px."""
    for split, count in (("train", 5), ("test", 3)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((32, 32), 60).convert("RGB")
                image = Image.blend(image, Image.new("RGB", (32, 32), colour), 0.5)
                image.save(root / split / name / f"{i}.{kind}")
    return root


FLAGS = ["--model", "vit_micro", "--epochs", "4", "--batch-size", "4", "--device", "cpu"]
FLAGS += ["--workers", "0", "--lr", "0.01"]


def command(script: Any, *words: Any) -> int:
    """The exit code of a script run in this process, which prints nothing."""
    sys.argv = [f"{script.__name__}.py", *map(str, words)]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            script.main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def vision_run(root: Path, *words: Any) -> Path:
    data = picture_folder(root / "data")
    assert command(train_vision, "--dataset", data, *FLAGS, *words, "--out", root / "run") == 0
    return root / "run"


def scored_again(script: Any, run: Path) -> None:
    args = script.arguments(["--evaluate", str(run), "--device", "cpu"])
    args.device, args.amp = torch.device("cpu"), False
    script.evaluate_run(args)


def training(root: Path) -> Callable[[bool], None]:
    """A run of two epochs, which stops after the first unless it resumes."""
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1] * 2))

    def work(resume: bool) -> None:
        args = argparse.Namespace(epochs=2, warmup_epochs=0, lr=1e-3, weight_decay=0.0, seed=0)
        args = loop.changed(args, amp=False, accumulate=1, resume=resume, method="san")
        model = small()
        methods.adapt(model, "san", train_vision.arguments(FLAGS))

        def loss_of(model: nn.Module, batch: tuple) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def stop(model: nn.Module) -> float:
            if (root / "checkpoint.pt").exists() and not resume:
                raise KeyboardInterrupt
            return 0.5

        batches = torch.utils.data.DataLoader(data, 2)
        loop.fit(model, batches, loss_of, stop, args, root, average=0.5)

    return work


def weights(root: Path) -> tuple[Path, Callable]:
    san.write({"state_dict": models.build("vit_micro", 2).state_dict()}, root / "weights.pt")
    args = train_vision.arguments(["--weights", str(root / "weights.pt")])
    return root / "weights.pt", lambda: train_vision.load_model(args, "vit_micro", [2])


def adapter(root: Path) -> tuple[Path, Callable]:
    model = small()
    san.attach(model, model.links(), shift=True, trainable=["head"])
    san.save_adapter(model, root / "adapter.pt")

    def read() -> None:
        base = small()
        before = copy.deepcopy(base)
        try:
            san.load_adapter(base, root / "adapter.pt")
        except Exception:
            assert [*base.state_dict()] == [*before.state_dict()], "the model is not as it was"
            assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters()))
            raise

    return root / "adapter.pt", read


def checkpoint(root: Path) -> tuple[Path, Callable]:
    work = training(root)
    try:
        work(False)
    except KeyboardInterrupt:
        pass
    whole = (root / "checkpoint.pt").read_bytes()

    def read() -> None:
        try:
            work(True)
        except FloatingPointError:  # well-formed numbers that are too large: said, as in any run
            pass
        finally:
            broken = (root / "checkpoint.pt").read_bytes()
            (root / "checkpoint.pt").write_bytes(whole if broken != whole else broken)

    return root / "checkpoint.pt", read


def merged(root: Path, file: str = "merged.pt") -> tuple[Path, Callable]:
    run = vision_run(root, "--weights", "none", "--epochs", 1)
    return run / file, lambda: scored_again(train_vision, run)


def merged_lm(root: Path, file: str = "merged.pt") -> tuple[Path, Callable]:
    tokenizer = questions.Tokenizer(["the", " correct"])
    model = models.LLaMA(len(tokenizer), 16, 1, 2, 1, 16, 1024)
    save_as_run(model, tokenizer, root / "tiny.pt")
    question_file(root)
    words = ["--data", root / "data", "--tasks", "boolq", "--weights", root / "tiny.pt"]
    words += ["--epochs", 1, "--device", "cpu"]
    assert command(train_lm, *words, "--out", root / "run") == 0
    return root / "run" / file, lambda: scored_again(train_lm, root / "run")


def results(root: Path) -> tuple[Path, Callable]:
    words = ["--weights", "none", "--epochs", 1, "--compare", "--seeds", 2]
    run = vision_run(root, *words, "--methods", "san", "linear")
    args = argparse.Namespace(table=[str(run)], seeds=3)

    def read() -> None:
        tables.print_tables(args)
        lines = tables.read_results(run / "results.jsonl")
        plot.accuracy(lines), plot.forest(lines)

    return run / "results.jsonl", read


def metrics(root: Path) -> tuple[Path, Callable]:
    run = vision_run(root, "--weights", "none", "--epochs", 1)
    return run / "metrics.jsonl", lambda: plot.curves([plot.read_run(run)])


def model_folder(root: Path, file: str) -> tuple[Path, Callable]:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the correct answer is true"] * 5, trainer)
    inner.save(str(root / "tokenizer.json"))
    model = models.LLaMA(inner.get_vocab_size(), 16, 1, 2, 1, 16, 64)
    folder = root / "model"
    llama.export(model, questions.Tokenizer([]), folder)
    (root / "tokenizer.json").rename(folder / "tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    return folder / file, lambda: llama_read(folder)


def llama_read(source: Path) -> None:
    args = train_lm.arguments(["--weights", str(source)])
    args.device = torch.device("cpu")
    model, tokenizer = train_lm.load_model(args)
    tokenizer.decode(tokenizer.encode("the correct answer is true"))
    model(torch.tensor([[0, 1]]))


def gguf(root: Path) -> tuple[Path, Callable]:
    import test_gguf

    model = test_gguf.model_for(test_gguf.VOCABULARY)
    test_gguf.write_file(root / "tiny.gguf", model, test_gguf.VOCABULARY)
    return root / "tiny.gguf", lambda: llama_read(root / "tiny.gguf")


def question_file(root: Path) -> tuple[Path, Callable]:
    folder = root / "data" / "boolq"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        records = microworld.questions("boolq", split, 10)
        (folder / f"{split}.json").write_text(json.dumps(records))
    tokenizer = questions.Tokenizer(["the"])

    def read() -> None:
        for ask in ("options", "words"):
            for question in questions.read_questions(folder / "train.json", ask=ask):
                questions.encode(question, tokenizer)

    return folder / "train.json", read


def picture(root: Path, kind: str) -> tuple[Path, Callable]:
    file = picture_folder(root / "data", kind) / "train" / "red" / f"0.{kind}"

    def read() -> None:
        splits = folders.read_splits(root / "data")
        [image for split in splits[:2] for image, _ in split]

    return file, read


FORMATS: dict[str, Callable[[Path], tuple[Path, Callable]]] = {
    "weights.pt": weights,
    "adapter.pt": adapter,
    "checkpoint.pt": checkpoint,
    "merged.pt, pictures": merged,
    "merged.pt, language": merged_lm,
    "config.json, pictures": lambda root: merged(root, "config.json"),
    "config.json, language": lambda root: merged_lm(root, "config.json"),
    "results.jsonl": results,
    "metrics.jsonl": metrics,
    "model.safetensors": lambda root: model_folder(root, "model.safetensors"),
    "a LLaMA's config.json": lambda root: model_folder(root, "config.json"),
    "tokenizer.json": lambda root: model_folder(root, "tokenizer.json"),
    "gguf": gguf,
    "questions": question_file,
    **{
        kind: lambda root, k=kind: picture(root, k) for kind in ("png", "jpg", "webp", "bmp", "tif")
    },
}

# ----------------------------------------------------------------------------------------- damage


def truncated(content: bytes, path: Path, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def flipped(content: bytes, path: Path, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def wrong_value(content: bytes, path: Path, dice: random.Random) -> bytes:
    """Well-formed: one entry, at any depth, is another value or missing; else four bytes are."""
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(replaced(san.read(path), dice, WRONG + WRONG_TENSORS), buffer)
        return buffer.getvalue()
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.decode().splitlines()]
        return "".join(json.dumps(x) + "\n" for x in replaced(lines, dice, WRONG)).encode()
    if path.suffix == ".json":
        return json.dumps(replaced(json.loads(content), dice, WRONG)).encode()
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        header = json.dumps(replaced(json.loads(content[8 : 8 + size]), dice, WRONG)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    place = dice.randrange(min(len(content), 2000))
    other = dice.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\1", b"\1\0\0\0"])
    return content[:place] + other + content[place + 4 :]


def replaced(content: Any, dice: random.Random, wrong: list) -> Any:
    """A copy, one entry of which, chosen level by level, has another value or is gone."""
    content = copy.copy(content)
    holder = isinstance(content, (dict, list)) and len(content) > 0
    if not holder:
        return dice.choice(wrong)
    key = dice.choice([*content] if isinstance(content, dict) else range(len(content)))
    fate = dice.random()
    if fate < 0.1:
        del content[key]
    elif fate < 0.4:
        content[key] = dice.choice(wrong)
    else:
        content[key] = replaced(content[key], dice, wrong)
    return content


DAMAGES = {"truncated": truncated, "a bit flipped": flipped, "a wrong value": wrong_value}

# ------------------------------------------------------------------------------------------ counts


class TooLong(BaseException):
    pass


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TooLong(f"no answer after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(read: Callable, path: Path, root: Path) -> str:
    """'read', 'refused', or what is wrong with the way in which it was refused.

    root: where the file is, and all that it may point to.
    """
    before = sorted(root.rglob("*"))
    try:
        with at_most(LONGEST), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
        found = "read"
    except (OSError, ValueError) as error:
        said = str(error)
        found = "refused"
        if "\n" in said or not said.strip():
            found = f"not one sentence: {said!r}"
        elif path.name not in said and str(root) not in said:
            found = f"not named: {said}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    return found if sorted(root.rglob("*")) == before else f"{found}, and files changed"


def count(name: str, files: int, seed: int = 0) -> dict[str, collections.Counter]:
    """Damage → outcomes of so many files of a format."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            path, read = FORMATS[name](Path(folder))
        whole = path.read_bytes()
        assert outcome(read, path, Path(folder)) == "read"
        for damage, break_it in DAMAGES.items():
            dice, found[damage] = random.Random(f"{name} {damage} {seed}"), collections.Counter()
            for _ in range(files):
                path.write_bytes(whole)
                path.write_bytes(break_it(whole, path, dice))
                found[damage][outcome(read, path, Path(folder))] += 1
    return found


# ------------------------------------------------------------------------------------------- kills


def in_a_process(work: Callable[[], int]) -> int:
    """The number of a new process, which does the work and ends with its exit code."""
    if number := os.fork():
        return number
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)


def killed_runs(root: Path, kills: int) -> str:
    """How many of the runs that are killed at random, and gone on with, end as a whole one."""
    data, dice, same, early = picture_folder(root / "data"), random.Random(0), 0, 0
    words = ["--dataset", data, *FLAGS, "--weights", "none", "--out"]

    def run(out: Path, *more: str) -> int:
        return in_a_process(lambda: command(train_vision, *words, out, *more))

    started = time.monotonic()
    assert os.waitpid(run(root / "whole"), 0)[1] == 0
    seconds = time.monotonic() - started
    for i in range(kills):
        out, code = root / str(i), None
        number = run(out)
        time.sleep(dice.uniform(0, seconds))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        if not (out / "merged.pt").exists():
            early += not (out / "checkpoint.pt").exists()
            more = ["--resume"] if (out / "checkpoint.pt").exists() else []
            code = os.waitpid(run(out, *more), 0)[1]
        states = [san.read(root / r / "merged.pt")["state_dict"] for r in ("whole", str(i))]
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
        alike = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        same += alike and code in (None, 0) and len(lines) == 5
    return f"{same} of {kills} killed runs ended as the whole one ({early} before an epoch ended)"


def killed_comparisons(root: Path, kills: int) -> str:
    data, dice, whole = picture_folder(root / "pictures"), random.Random(0), 0
    words = ["--dataset", data, *FLAGS, "--weights", "none", "--compare", "--seeds", 2]
    words += ["--methods", "linear", "san", "lora", "--out", root / "compared"]
    started = time.monotonic()
    os.waitpid(in_a_process(lambda: command(train_vision, *words)), 0)
    seconds, path = time.monotonic() - started, root / "compared" / "results.jsonl"
    wanted = {tuple(map(x.get, KEYS)) for x in tables.read_results(path)}
    for _ in range(kills):
        path.unlink()
        for pause in (dice.uniform(0, seconds), None):
            number = in_a_process(lambda: command(train_vision, *words))
            if pause is not None:
                time.sleep(pause)
                os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        lines = [tuple(map(x.get, KEYS)) for x in tables.read_results(path)]
        whole += sorted(lines, key=str) == sorted(wanted, key=str)
    return f"{whole} of {kills} killed comparisons lost and doubled no line"


KEYS = ("task", "model", "method", "part", "lr", "seed")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--files", type=int, default=20, help="of each format and damage")
    p.add_argument("--kills", type=int, default=0, help="of runs; half as many of comparisons")
    p.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    print("| file | damage | refused | read | faults |\n| --- | --- | --- | --- | --- |")
    for name in args.formats if args.files else ():
        for damage, found in count(name, args.files, args.seed).items():
            faults = {what: n for what, n in found.items() if what not in ("read", "refused")}
            numbers = [found["refused"], found["read"], sum(faults.values())]
            print(f"| {name} | {damage} | {' | '.join(map(str, numbers))} |", flush=True)
            for what, n in faults.items():
                print(f"{n} × {what[:300]!r}", file=sys.stderr, flush=True)
    for kind, kills in ((killed_runs, args.kills), (killed_comparisons, args.kills // 2)):
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                print(kind(Path(folder), kills), flush=True)


if __name__ == "__main__":
    main()
