"""lab/ranks.py: two processes under torchrun do what one does, and end together.

torchrun starts this file itself, with a list of what its two ranks are to do.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from asking import save_as_run, tiny_model
from PIL import Image
from running import command_of, metrics, without_times
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import san
import train_lm
import train_vision
from lab import batches, loop, methods, microworld, pictures, questions, ranks, visual

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.usefixtures("one_thread"),
]
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# --------------------------------------------------------------------- what torchrun's ranks do


def scored() -> dict:
    """Outputs of three batches and of one, and words' scores of three and of one."""
    args, found = Namespace(batch_size=1, workers=0, device=CPU), {}
    for count in (700, 3):
        rows = torch.arange(float(count))
        outputs, labels = batches.outputs_of(lambda x: x.sqrt(), TensorDataset(rows, rows), args)
        found[f"outputs {count}"] = [outputs.tolist(), labels.tolist()]
    model = tiny_model(20)
    for count in (5, 1):
        tokens = torch.arange(9 * count).view(count, 9) % 20
        loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 2)
        found[f"words {count}"] = visual.next_words(model, loader, CPU)[1]
    return found


def work(jobs: list) -> None:
    """Every rank: the jobs, one after another, in one group; the first keeps what they gave."""
    torch.set_num_threads(1)
    if jobs[0] in ("raise", "kill"):
        train_vision.score = functools.partial(failing, jobs[0])
        sys.exit(command_of(train_vision)(*jobs[1:]))
    keep_first_checkpoints()
    with ranks.joined():
        found = [scored(), *(run(*words) for words in jobs), sharing()]
    if not ranks.number():
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
    globals()["last"] = Last()


class Last:
    """Says when Python takes it apart."""

    print = staticmethod(print)

    def __del__(self):
        self.print("taken apart", file=sys.stderr)


def sharing() -> list:
    """Of a SAN, sharded where there are ranks: numbers of its frozen weights here, gradients."""
    model = tiny_model(20)
    san.attach(model, model.links(), trainable=["norm"])
    if ranks.count() > 1:
        ranks.shard(model, CPU)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = ranks.own(torch.arange(20).view(2, 10))
    loss = questions.token_loss(model, tokens[:, :-1], tokens[:, 1:]) / ranks.count()
    loss.backward()
    ranks.add_up(loss.detach(), [*trained.values()])
    gradients = ranks.gathered({name: p.grad for name, p in trained.items()})
    here = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen)
    return [here, {name: gradient.tolist() for name, gradient in gradients.items()}]


def run(kind: str, *words) -> int:
    """A script's exit code; --workers stands for pictures that stay in their files."""
    pictures.MOST_KEPT = 0 if "--workers" in words else 512 * 10**6
    return command_of(train_lm if kind == "lm" else train_vision)(*words)


def failing(how: str, *_) -> float:
    """Scoring that one rank alone cannot do, while the other shows a bar."""
    if not ranks.number() and how == "raise":
        threading.Thread(target=show_bars, daemon=True).start()
    ranks.total(0)
    if ranks.number() and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ranks.number():
        raise OSError("a picture is broken")
    return ranks.total(0)[0]


def show_bars() -> None:
    while True:
        os.write(2, b"\r50 %|")


def keep_first_checkpoints() -> None:
    """Of every run, copy its folder as it is after the first epoch to <out>-1."""
    write = san.write

    def writing(content, path, save=None):
        write(content, path, save)
        copy = path.parent.with_name(f"{path.parent.name}-1")
        if path.name == "checkpoint.pt" and not copy.exists():
            shutil.copytree(path.parent, copy)

    san.write = writing


def torchrun(jobs: list, folder: Path) -> tuple[int, list, str]:
    """Exit code, what the jobs gave, and what was written to stderr."""
    found = folder / "found.json"
    environment = os.environ | {"FOUND": str(found), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--monitor-interval=5", __file__, json.dumps(jobs, default=str)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=500)[1]
    finally:
        process.terminate()  # the ranks too, if they hang
    return process.returncode, json.loads(found.read_text()) if found.exists() else [], said


# ------------------------------------------------------------------- two ranks beside one process


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, list]:
    """Runs of two epochs: pictures in memory and in files, questions; the last batch is of one."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, counts in (("train", (21, 20)), ("test", (6, 7))):
        for channel, count in enumerate(counts):
            folder = root / "noise" / split / "ab"[channel]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 128, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    for task, count in (("boolq", 12), ("social_i_qa", 10)):
        (root / "two" / task).mkdir(parents=True)
        for split in ("train", "test"):
            content = json.dumps(microworld.questions(task, split, count - (split == "test")))
            (root / "two" / task / f"{split}.json").write_text(content)
    tokenizer = questions.microworld_tokenizer()
    weights = save_as_run(tiny_model(len(tokenizer)), tokenizer, root / "tiny.pt")
    # without β: that of a key has a gradient of zero but for rounding, which Adam makes a step of
    seen = ["vision", "--dataset", root / "noise", "--model", "vit_micro", "--no-shift"]
    asked = ["lm", "--data", root / "two", "--tasks", "boolq", "social_i_qa", "--accumulate", 2]
    own = {
        "in memory": [*seen, "--batch-size", 8],
        "in files": [*seen, "--batch-size", 8, "--workers", 0],
        "questions": [*asked, "--weights", weights, "--batch-size", 3],
    }
    return {name: [*words, "--epochs", 2, "--device", "cpu"] for name, words in own.items()}


@pytest.fixture(scope="module")
def runs(cases, tmp_path_factory, one_thread):
    """Folder of runs by one and two ranks, and what else two were asked and gave."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(san, "write", san.write)  # put back what keep_first_checkpoints puts there
        keep_first_checkpoints()
        patch.setattr(pictures, "MOST_KEPT", 0)  # and what `run` puts there
        for name, words in cases.items():
            assert run(*words, "--out", root / f"one {name}") == 0
    jobs = []
    for name, words in cases.items():
        words = [*words, *(["--workers", 1] if name == "in files" else [])]
        jobs.append([*words, "--out", root / f"two {name}"])
    for name in ("in memory", "questions"):
        shutil.copytree(root / f"one {name}-1", root / f"on {name}")
        jobs.append([*cases[name], "--out", root / f"on {name}", "--resume"])
    shutil.copytree(root / "one questions-1", root / "on shards")
    jobs.append([*cases["questions"], "--shard", "--out", root / "shards"])
    jobs.append([*cases["questions"], "--shard", "--out", root / "on shards", "--resume"])
    jobs.append(["lm", "--evaluate", root / "one questions", "--shard", "--device", "cpu"])
    jobs.append(["vision", "--evaluate", root / "one in memory", "--device", "cpu"])
    jobs.append(["vision", "--compare"])
    return root, jobs, *torchrun(jobs, root)


def test_two_ranks_end_all_that_is_asked_and_refuse_comparisons_once(runs):
    _, jobs, code, found, said = runs
    assert code == 0 and found[1:-1] == [0] * (len(jobs) - 1) + [2]
    assert said.count("error: torchrun is for one run") == 1
    assert "taken apart" not in said  # threads that torch still has could abort it


def test_batches_dealt_out_come_back_in_order_with_none_lost_or_doubled(runs):
    assert runs[3][0] == scored()


@pytest.mark.parametrize("name", ["in memory", "in files", "questions"])
def test_two_ranks_train_what_one_process_does(name, runs):
    require_alike(runs[0] / f"one {name}", runs[0] / f"two {name}")


def require_alike(one: Path, two: Path) -> None:
    """The same history and figures, and the same merged weights, but for rounding."""
    first, second = (without_times(metrics(out)) for out in (one, two))
    for record, other in zip(first, second, strict=True):
        for key in record.keys() - {"gamma", "merge_difference"}:
            same = record[key]
            assert other[key] == (
                pytest.approx(same, rel=1e-4) if isinstance(same, float) else same
            ), key
    merged = [san.read(out / "merged.pt")["state_dict"] for out in (one, two)]
    for key, value in merged[0].items():
        torch.testing.assert_close(merged[1][key], value, atol=1e-5, rtol=1e-4, msg=key)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


@pytest.mark.parametrize("name", ["in memory", "questions"])
def test_two_ranks_resume_what_one_process_began(name, runs):
    require_alike(runs[0] / f"one {name}", runs[0] / f"on {name}")


@pytest.mark.parametrize("name", ["in memory", "questions"])
def test_one_process_resumes_what_two_ranks_began(name, runs, cases):
    out = runs[0] / f"two {name}-1"
    assert run(*cases[name], "--out", out, "--resume") == 0
    require_alike(runs[0] / f"one {name}", out)


def test_two_ranks_share_the_weights_and_train_what_one_process_does(runs, cases):
    root, *_, found, _ = runs
    (whole, gradients), (here, summed) = sharing(), found[-1]
    assert here == whole / 2 and summed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert summed[name] == pytest.approx(gradient, rel=1e-4, abs=1e-6), name
    one, begun = root / "one questions", root / "shards-1"
    assert run(*cases["questions"], "--out", begun, "--resume") == 0
    for out in (root / "shards", root / "on shards", begun):
        require_alike(one, out)


@pytest.mark.parametrize(
    "how, sentence", [("raise", "a picture is broken"), ("kill", "a rank was lost, and the run")]
)
def test_a_rank_that_fails_ends_the_others_with_one_sentence(how, sentence, cases, tmp_path):
    out = tmp_path / "run"
    code, _, said = torchrun([how, *cases["in memory"][1:], "--out", out], tmp_path)
    assert code == 1
    ours = [line for line in said.splitlines() if line.startswith("train_vision.py: ")]
    assert len(ours) == 1 and ours[0].startswith(f"train_vision.py: {sentence}")
    assert not (out / "merged.pt").exists()


# ------------------------------------------------------------------------- without other processes


@pytest.mark.parametrize("count, rows", [(3, 7), (3, 2), (2, 4)])
def test_the_ranks_of_a_batch_have_all_of_its_rows_once(count, rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    listed, there = [], []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        own, whole = ranks.collate(tuple, [*range(rows)]), ranks.cut([torch.arange(rows)])
        assert len(whole) == (rank < rows) and [*own] == [n for t in whole for n in t.tolist()]
        listed += own
        there += ranks.dealt(range(rows))
    assert sorted(listed) == sorted(there) == [*range(rows)]


class Dice(Dataset):
    """Rows that are nothing but what is drawn for them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i, torch.randint(10**6, ()).item()])


def test_what_is_drawn_for_a_picture_is_its_own_whatever_processes_load_it():
    def drawn(workers: int, seed: int) -> dict[int, int]:
        torch.manual_seed(seed)
        args = Namespace(batch_size=4, workers=workers, device=CPU)
        rows = torch.cat([*batches.loader(Dice(), args, shuffle=True)]).tolist()
        assert torch.initial_seed() == seed
        return dict(sorted(rows))

    one = drawn(0, 1)
    assert len({*one.values()}) == 6 and drawn(2, 1) == one
    assert not {*one.values()} & {*drawn(0, 2).values()}


def test_a_step_sends_every_gradient_once_and_three_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sent, model = [], tiny_model(20)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sent.append(sums.nbytes))
    model.requires_grad_(False)
    san.attach(model, model.links(), trainable=["norm"])
    args = dict(epochs=1, warmup_epochs=0, lr=0.1, weight_decay=0, seed=0, amp=False, accumulate=1)
    tokens = torch.arange(20).view(2, 10)
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 2)

    def loss_of(model: nn.Module, batch: list) -> torch.Tensor:
        return questions.token_loss(model, *batch)

    loop.fit(model, loader, loss_of, None, Namespace(**args))
    rows_and_weight, loss = 2 * 8, 4
    assert sent == [rows_and_weight, loss + 4 * methods.count(model)[0]]


def test_a_rank_has_a_gpu_of_its_own_and_no_other_is_named(monkeypatch):
    for key, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert ranks.gpu("cuda") == "cuda:1" and taken == [1]
    with pytest.raises(ValueError, match="leave its number out"):
        ranks.gpu("cuda:0")


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
