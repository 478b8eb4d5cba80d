"""lab/tables.py: a search chooses on validation, its results are kept, tables tell them."""

import argparse

import pytest
import torch
from torch import nn

from lab import tables

KEY = {"task": "a", "model": "m", "method": "san"}
FIGURES = {"trainable": 5, "percent": 2.0, "seconds": 1.0, "memory": 9.0}


def searched(tmp_path, rates=(1, 2, 3), seeds=2, again=False, **changes) -> tuple[list, list]:
    """The trainings that a search made, (rate, seed, last), and all lines of its journal."""
    values = {1: 0.5, 2: 0.7, 3: 0.6}
    made = []

    def train(args: argparse.Namespace, note: str, last: bool) -> tuple[nn.Module, dict]:
        made.append((args.lr, args.seed, last))
        if args.lr not in values:
            raise FloatingPointError("too high")
        return nn.Linear(1, 1), FIGURES | {"val": None if last and again else values[args.lr]}

    def read(model: nn.Module) -> tuple[torch.Tensor, dict]:
        return model.weight, {"test": 0.25}

    args = argparse.Namespace(**{"seeds": seeds, "lr": None, "seed": 0} | changes)
    journal = tables.Journal(tmp_path / "results.jsonl", {"epochs": 1})
    tables.search(args, KEY, rates, train, read, journal, again)
    return made, tables.read_results(tmp_path / "results.jsonl")


def test_a_search_chooses_on_validation_and_scores_every_seed_once(tmp_path):
    made, lines = searched(tmp_path)
    assert made == [(1, 0, False), (2, 0, False), (3, 0, False), (2, 1, True)]
    assert [(line["part"], line["lr"], line["seed"]) for line in lines] == [
        *(("search", rate, 0) for rate in (1, 2, 3)),
        *(("test", 2, seed) for seed in (0, 1)),
    ]
    assert not any("test" in line for line in lines if line["part"] == "search")
    assert searched(tmp_path)[0] == []  # all of it is known
    assert searched(tmp_path, seeds=3)[0] == [(2, 2, True)]


def test_a_search_that_was_stopped_goes_on_run_by_run(tmp_path):
    whole = searched(tmp_path)[1]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    made, lines = searched(tmp_path)
    assert made[0] == (3, 0, False) and {*made[1:]} == {(2, 0, True), (2, 1, True)}
    assert lines == whole


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    whole = searched(tmp_path)[1]
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    made, lines = searched(tmp_path)
    assert made == [(2, 1, True)] and lines == whole


def test_the_chosen_rate_is_trained_anew_where_the_last_training_differs(tmp_path):
    made, lines = searched(tmp_path, again=True)
    assert made[3:] == [(2, 0, True), (2, 1, True)]
    assert [line["val"] for line in lines] == [0.5, 0.7, 0.6, None, None]


def test_a_rate_that_does_not_stay_finite_is_out(tmp_path):
    made, lines = searched(tmp_path, rates=(9, 1), seeds=1)
    assert made == [(9, 0, False), (1, 0, False)]
    assert [line["val"] for line in lines] == [None, 0.5, 0.5]
    with pytest.raises(FloatingPointError, match="no learning rate"):
        searched(tmp_path, rates=(9,))


@pytest.mark.parametrize("text", ["{", "[]\n", '{"task": 1}\n'])
def test_a_broken_file_of_results_is_called_so(text, tmp_path):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(OSError, match="is broken"):
        tables.read_results(tmp_path / "results.jsonl")


def test_tables_have_means_by_group_where_no_task_is_missing():
    lines = [
        FIGURES
        | {"task": task, "group": group, "model": "m", "method": method, "part": "test", "lr": 1e-3}
        | {"seed": seed, "test": test, "merge_same": 1.0, "merge_difference": 0.0, "options": {}}
        for method, task, group, seed, test in [
            ("san", "a", "natural", 0, 0.2),
            ("san", "a", "natural", 1, 0.4),
            ("san", "b", "natural", 0, 0.5),
            ("san", "c", "structured", 0, 0.9),
            ("lora", "c", "structured", 0, 0.8),
        ]
    ]
    short = tables.tables(lines).split("\n\n")[0].splitlines()
    assert short[0] == "| model | method | trained | a | b | c | natural | structured | mean |"
    assert short[2] == (
        "| m | san | 2.00 % | 30.0 ± 14.1 | 50.0 ± 0.0 | 90.0 ± 0.0 | 40.0 | 90.0 | 56.7 |"
    )
    assert short[3] == "| m | lora | 2.00 % |  |  | 80.0 ± 0.0 |  | 80.0 |  |"
    lines = [line | {"options": {"epochs": 9 - line["seed"], "lr": None}} for line in lines]
    rows = tables.tables(lines).split("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [
        "san, epochs 9",
        "san, epochs 8",
        "lora, epochs 9",
    ]
    with pytest.raises(ValueError, match="no scored run"):
        tables.tables([line | {"part": "search"} for line in lines])


def test_mean_and_standard_deviation_over_seeds():
    assert tables.spread([0.50, 0.52, 0.57]) == "53.0 ± 3.6"
