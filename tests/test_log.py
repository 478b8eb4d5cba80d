"""lab/log.py: what a run's log holds, that it goes on where a run does, and what is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import torch
from running import command_of, metrics, stop_after
from torch import nn

import san
import train_lm
import train_vision
from lab import loop, saved
from lab.log import NOWHERE, Log, gammas

command = command_of(train_vision)
TIMED = ("seconds", "per_second", "wall", "memory")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return faults.picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def flags(pictures) -> list:
    """Three epochs of two steps: eight pictures are trained on, four at a time."""
    return ["--dataset", pictures, *faults.FLAGS, "--epochs", "3", "--weights", "none"]


class Board:
    """TensorBoard's writer, in its place: a file per start."""

    def __init__(self, folder: Path, purge_step: int | None):
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{len([*folder.iterdir()])}.jsonl"
        self.path.write_text(json.dumps(purge_step) + "\n")

    def add_scalar(self, *row: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add_histogram(self, name: str, vector: torch.Tensor, step: int, bins: int) -> None:
        self.add_scalar(name, vector.tolist(), step)

    def flush(self) -> None: ...

    close = flush


def read_board(folder: Path) -> dict[tuple[str, int], object]:
    """Name, step → value, without what a later start has purged; none stands there twice."""
    found = {}
    for path in sorted(folder.iterdir()):
        purge, *rows = map(json.loads, path.read_text().splitlines())
        found = {key: v for key, v in found.items() if purge is None or key[1] < purge}
        assert len({(name, step) for name, _, step in rows} - found.keys()) == len(rows)
        found |= {(name, step): value for name, value, step in rows}
    return found


class Wandb:
    """The module wandb, in its place: it keeps what is logged, by the run's id."""

    def __init__(self):
        self.runs, self.options, self.codes = {}, [], []

    class Error(Exception): ...

    def init(self, **options: object) -> SimpleNamespace:
        own = options["id"] or f"id{len(self.runs)}"
        folder = options["dir"] / "wandb" / f"offline-run-2026_{len(self.options):06}-{own}"
        folder.mkdir(parents=True)
        self.options.append(options)
        rows = self.runs.setdefault(own, {})

        def log(figures: dict) -> None:
            step = figures.pop("step")
            assert not {(name, step) for name in figures} & rows.keys()
            rows.update({(name, step): value for name, value in figures.items()})

        def define_metric(name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def finish(exit_code: int) -> None:
            self.codes.append(exit_code)

        return SimpleNamespace(log=log, finish=finish, define_metric=define_metric)

    @staticmethod
    def Histogram(values: list, num_bins: int) -> list:
        return values


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    """Both packages replaced, wandb's by what is given."""
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board)
    )
    return module


def said(capsys) -> str:
    """The sentence that a run ended with; a bar may stand before it."""
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in bar for bar in bars)
    return line


def untimed(rows: dict) -> dict:
    return {key: value for key, value in rows.items() if not key[0].endswith(TIMED)}


# ---------------------------------------------------------------------------------- what it holds


def test_a_run_logs_steps_epochs_and_its_result_in_both(flags, tmp_path, wandb):
    assert command(*flags, "--out", tmp_path / "run", "--log", "tensorboard", "wandb") == 0
    board = read_board(tmp_path / "run" / "tensorboard")
    assert wandb.runs == {"id0": board} and wandb.codes == [0]
    assert wandb.options[0]["name"] == "run" and wandb.options[0]["config"]["lr"] == 0.01
    *history, result = metrics(tmp_path / "run")
    for step, record in zip((1, 3, 5), history, strict=True):
        for key, value in record.items():
            assert board["epoch/" + key, step] == value
    for step in range(6):  # the first of an epoch and its last
        assert board["train/loss", step] > 0
        assert board["train/rate", step] == loop.rate_at(step, 6, round(0.3 * 2), 0.01)
    for key in ("test", "test_merged", "merge_difference", "trainable", "val"):
        assert board["result/" + key, 6] == result[key]
    _, gamma = saved.links_and_gammas(tmp_path / "run" / "adapter.pt")
    assert {name for name, _ in board if name.startswith("gamma/")} == {f"gamma/{k}" for k in gamma}
    for layer, values in gamma.items():
        assert board[f"gamma/{layer}", 5] == values.tolist() != board[f"gamma/{layer}", 1]


def test_a_llamas_tasks_are_told_and_what_is_no_number_is_not(tmp_path, wandb, monkeypatch):
    result = {"method": "san", "parts": {"boolq": 0.5}, "val": None, "gamma": {}}
    model = nn.Sequential(nn.Linear(2, 2))
    san.attach(model, [san.Link("0")])
    monkeypatch.setattr(loop, "report", lambda *_: None)
    with Log(["wandb"], tmp_path) as log:
        args = SimpleNamespace(out=tmp_path, method="san")
        log.write("train", {"loss": 1.0}, 7)
        score = torch.zeros(3, 2), {"test": 0.25}
        loop.conclude(model, args, [], result, lambda _: score, {}, log=log)
    logged = {name: value for (name, _), value in wandb.runs["id0"].items()}
    assert {step for _, step in wandb.runs["id0"]} == {7, 8}
    assert logged["result/boolq"] == 0.5 and logged["result/test"] == 0.25
    assert {*logged} == {"train/loss", "result/boolq"} | {
        f"result/{k}" for k in ("test", "test_merged", "merge_difference", "merge_same")
    }


def test_gammas_are_named_by_their_layers_and_layers_without_one_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    san.attach(model, [san.Link("0"), san.Link("1", "0")], scale=False)
    assert {k: v.tolist() for k, v in gammas(model).items()} == {"0": [1, 1, 1]}
    assert gammas(nn.Linear(2, 2)) == {}


def test_linear_and_a_llama_pass_their_log_on(flags, tmp_path, wandb, monkeypatch):
    out = tmp_path / "run"
    assert command(*flags, "--method", "linear", "--out", out, "--log", "tensorboard") == 0
    logged = read_board(out / "tensorboard")
    assert [step for name, step in logged if name == "epoch/loss"] == [1, 3, 5]
    seen = []
    monkeypatch.setattr(loop, "fit", lambda *_, log, **__: seen.append(log))
    job = SimpleNamespace(loader=[], validate=None)
    monkeypatch.setattr(loop, "train_and_measure", lambda model, args, note, train: train())
    with Log() as log:
        args = SimpleNamespace(tasks=["corpus"])
        train_lm.train(None, job, args, None, "san", log)
    assert seen == [log]


def test_nothing_is_logged_where_nothing_asks_for_it(flags, tmp_path, wandb):
    assert command(*flags, "--out", tmp_path / "run") == 0
    assert not wandb.options and not (tmp_path / "run" / "tensorboard").exists()
    assert NOWHERE.board is NOWHERE.run is None


# ------------------------------------------------------------------------- where one run ends


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_run_goes_on_in_its_log_without_doubled_epochs(
    epochs, flags, tmp_path, wandb, monkeypatch
):
    words = [*flags, "--log", "tensorboard", "wandb", "--out"]
    assert command(*words, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(epochs, patch)
        assert command(*words, tmp_path / "run") == 130
    assert command(*words, tmp_path / "run", "--resume") == 0
    whole, resumed = (
        untimed(read_board(tmp_path / name / "tensorboard")) for name in ("whole", "run")
    )
    assert resumed == whole
    assert {*wandb.runs} == {"id0", "id1"} and wandb.codes == [0, 1, 0]
    assert [options["id"] for options in wandb.options] == [None, None, "id1"]
    assert untimed(wandb.runs["id0"]) == untimed(wandb.runs["id1"])


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_once(
    flags, tmp_path, wandb, monkeypatch
):
    """Killed when the second epoch was logged and not yet kept."""
    words, write = [*flags, "--log", "tensorboard", "--out", tmp_path / "run"], Log.write

    def stopping(self, group, *rest, **more):
        write(self, group, *rest, **more)
        if self.board and group == "epoch" and self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", stopping)
        assert command(*words) == 130
    assert command(*words, "--resume") == 0
    board = read_board(tmp_path / "run" / "tensorboard")
    assert [step for name, step in board if name == "epoch/val"] == [1, 3, 5]


def test_a_new_run_in_an_old_ones_folder_has_a_log_of_its_own(flags, tmp_path, wandb):
    words = [*flags, "--log", "tensorboard", "wandb", "--out", tmp_path]
    assert command(*words) == command(*words, "--epochs", "1") == 0
    assert {step for _, step in read_board(tmp_path / "tensorboard")} == {0, 1, 2}
    assert {step for _, step in wandb.runs["id1"]} == {0, 1, 2}
    assert command(*flags, "--out", tmp_path) == 0  # nor does one without a log keep the old one's
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_is_no_setting_of_a_runs_numbers(flags, tmp_path, wandb, monkeypatch):
    args = train_vision.arguments([*map(str, flags), "--log", "wandb"])
    assert args.log == ["wandb"] and "log" not in loop.settings(args)
    assert args.out == train_vision.arguments([*map(str, flags)]).out
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert command(*flags, "--out", tmp_path) == 130
    assert command(*flags, "--out", tmp_path, "--resume", "--log", "wandb") == 0
    assert saved.config(tmp_path)["log"] is None


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_its_command_and_the_old_run_stays(
    kind, module, flags, tmp_path, monkeypatch, capsys
):
    assert command(*flags, "--out", tmp_path) == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, module, None)
    assert command(*flags, "--out", tmp_path, "--log", kind) == 2
    line = said(capsys)
    assert f"pip install {kind}" in line
    assert (tmp_path / "merged.pt").exists()


def test_no_login_is_one_sentence_and_the_old_run_stays(
    flags, tmp_path, wandb, monkeypatch, capsys
):
    assert command(*flags, "--out", tmp_path) == 0
    capsys.readouterr()

    def refuse(**_):
        raise Wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert command(*flags, "--out", tmp_path, "--log", "wandb") == 1
    line = said(capsys)
    assert "No API key configured" in line and "WANDB_MODE=offline" in line
    assert (tmp_path / "merged.pt").exists()


def test_a_full_disk_is_one_sentence_and_the_last_epoch_is_kept(
    flags, tmp_path, wandb, monkeypatch, capsys
):
    add = Board.add_scalar

    def full(self, name, value, step):
        if step == 2:
            raise OSError(28, "No space left on device")
        add(self, name, value, step)

    monkeypatch.setattr(Board, "add_scalar", full)
    assert command(*flags, "--out", tmp_path, "--log", "tensorboard", "wandb") == 1
    assert said(capsys) == (
        f"train_vision.py: could not write {tmp_path / 'tensorboard'}: No space left on device"
    )
    assert wandb.codes == [1] and len(saved.checkpoint(tmp_path / "checkpoint.pt")["history"]) == 1


@pytest.mark.parametrize(
    "words", [["--compare"], ["--ablation"], ["--dataset", "vtab"], ["--protocol", "vtab1k"]]
)
def test_a_comparison_has_no_log(words, capsys):
    assert command(*words, "--log", "wandb") == 2
    assert "--log is of one run" in capsys.readouterr().err
    assert command("--log", "paper") == 2
    assert "choose from" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the real packages


def test_tensorboard_itself_reads_every_figure_once(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    vector = torch.linspace(0.9, 1.1, 101)
    for first, last in ((0, 5), (3, 9)):  # killed in step 5, gone on with from 3
        with Log(["tensorboard"], tmp_path) as log:
            for step in range(first, last):
                log.write("train", {"loss": step / 2, "note": "text"}, step)
                log.write("epoch", {"val": 0.5}, step, {"fc1": vector})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "epoch/val"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, step / 2) for step in range(9)
    ]
    histogram = events.Histograms("gamma/fc1")[-1].histogram_value
    assert histogram.num == 101 and max(histogram.bucket) < 5  # fine enough to be seen


def test_tensorboards_own_thread_prints_nothing_where_the_disk_is_full(tmp_path, capfd):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    resource = pytest.importorskip("resource", reason="Unix has it")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="^could not write .*tensorboard: File too large$"):
        with Log(["tensorboard"], tmp_path) as log:
            log.write("train", {"loss": 1.0}, 0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            try:
                for step in range(1, 99):
                    log.write("train", {"loss": 1.0}, step)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capfd.readouterr().err


def test_wandb_itself_works_offline_and_finds_its_run_again(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resumed in (False, True, False):
        with Log(["wandb"], tmp_path, {"lr": 0.1}, resumed) as log:
            log.write("epoch", {"val": 0.5}, 3, {"fc1": torch.ones(5)})
            ids.append(log.run.id)
            assert dict(log.run.config) == {"lr": 0.1}
    assert ids[0] == ids[1] != ids[2]
    assert len([*tmp_path.glob("wandb/offline-run-*/*.wandb")]) == 3
