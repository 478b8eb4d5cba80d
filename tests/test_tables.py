"""lab/tables.py: a search chooses on validation, its results are kept, tables tell them."""

import argparse
import json
import statistics

import pytest
import torch
from running import without_times
from torch import nn

from lab import paired, tables

KEY = {"task": "a", "model": "m", "method": "san"}
FIGURES = {"trainable": 5, "percent": 2.0, "seconds": 1.0, "memory": 9.0}


VALUES = {1: 0.5, 2: 0.7, 3: 0.6}


def searched(
    tmp_path, rates=(1, 2, 3), seeds=2, again=False, values=VALUES, **changes
) -> tuple[list, list]:
    """The trainings that a search made, (rate, seed, last), and all lines of its journal.

    values: rate → validation accuracy; at any other the loss does not stay finite.
    """
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
    found = tables.search(args, KEY, rates, train, read, journal, again)
    lines = tables.read_results(tmp_path / "results.jsonl")
    assert all(line in lines for line in found)
    assert all(line["wall"] > 0 for line in lines if line["val"] is not None)
    return made, without_times(lines)


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
    made, lines = searched(tmp_path, rates=(9, 2, 1), seeds=1)
    assert made == [(9, 0, False), (2, 0, False), (1, 0, False)]
    assert [line["val"] for line in lines] == [None, 0.7, 0.5, 0.7]
    for rates in ((9,), (8, 9)):
        with pytest.raises(FloatingPointError, match="no learning rate"):
            searched(tmp_path, rates=rates)


def test_a_grid_whose_end_is_the_best_is_widened(tmp_path, capsys):
    values = {0.01: 0.5, 0.03: 0.6, 0.1: 0.7, 0.3: 0.65}
    made, lines = searched(tmp_path, rates=(0.01, 0.03), seeds=1, values=values)
    assert [rate for rate, *_ in made] == [0.01, 0.03, 0.1, 0.3]
    assert lines[-1]["part"] == "test" and lines[-1]["lr"] == 0.1
    assert "0.03, is the grid's end: trying 0.1 too" in capsys.readouterr().out
    assert searched(tmp_path, rates=(0.01, 0.03), seeds=1, values=values)[0] == []


def test_a_widened_search_that_was_stopped_makes_the_same_choice(tmp_path):
    values = {1: 0.7, 3: 0.6, 0.3: 0.8, 0.1: 0.9, 0.03: 1.0}
    whole = searched(tmp_path, rates=(3, 1), values=values)[1]
    path = tmp_path / "results.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    assert [line["lr"] for line in whole] == [3, 1, 0.3, 0.1, 0.1, 0.1]  # two more, no third
    for count in range(1, len(kept)):
        path.write_text("".join(kept[:count]))
        assert searched(tmp_path, rates=(3, 1), values=values)[1] == whole


def test_a_single_rate_is_not_widened_and_an_infinite_end_is_one(tmp_path):
    assert [rate for rate, *_ in searched(tmp_path / "1", rates=(3,), seeds=1)[0]] == [3]
    made, lines = searched(tmp_path / "2", rates=(1, 3), seeds=1, values={1: 0.5, 3: 0.6})
    assert [rate for rate, *_ in made] == [1, 3, 10]
    assert lines[-1]["lr"] == 3 and lines[-2]["val"] is None


@pytest.mark.parametrize(
    ("tried", "best", "further"),
    [
        ({3e-2: 0.5, 1e-2: 0.4, 1e-3: 0.1}, 3e-2, 1e-1),
        ({2e-2: 0.5, 5e-3: 0.4, 1e-3: 0.1}, 2e-2, 1e-1),
        ({8e-3: 0.5, 2e-3: 0.4, 5e-4: 0.1}, 8e-3, 3e-2),
        ({1e-3: 0.5, 3e-4: 0.4}, 1e-3, 3e-3),
        ({1e-3: 0.4, 3e-4: 0.5}, 3e-4, 1e-4),
        ({1e-3: 0.5, 5e-3: 0.4}, 1e-3, 3e-4),
        ({1e-3: 0.5, 5e-3: 0.6, 2e-2: 0.4}, 5e-3, None),
        ({1e-3: 0.5, 5e-3: 0.5, 2e-2: 0.4}, 5e-3, None),  # a tie
        ({1e-4: 0.1, 1e-3: 0.5, 5e-3: 0.4, 2e-2: 0.5}, 1e-3, None),
    ],
)
def test_the_choice_and_the_half_decade_beyond_it(tried, best, further):
    assert tables.choice(tried) == best and tables.beyond(tried) == further


def test_the_cost_is_told_by_what_is_left_and_what_a_run_took(tmp_path, capsys):
    journal = tables.Journal(tmp_path / "results.jsonl", {})
    args = argparse.Namespace(seeds=2, epochs=7)
    searches = [(KEY | {"model": model}, [1, 2, 3]) for model in ("m", "n")]

    def told(**steps) -> str:
        tables.announce(searches, args, journal, lambda model: steps[model])
        return capsys.readouterr().out

    assert told(m=(0.3, 1000), n=(0.1, 3000)) == (
        "about 10 runs of 7 epochs, 50 min at 0.3 s per step of m, 0.1 s per step of n\n"
    )
    line = KEY | {"val": 0.5, "lr": 1, "seed": 0}
    journal.add(line | {"part": "search", "wall": 5000.0})
    journal.add(line | {"part": "test", "wall": 7000.0})
    assert told(n=(0.1, 3000)) == (
        "about 8 runs of 7 epochs, 5.4 h at 6e+03 s per run of m so far, 0.1 s per step of n\n"
    )
    searches = [(KEY, [1])]
    args.seeds = 1
    assert told() == ""  # nothing is left


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
        | {"percent": 5.0 if task == "c" else 2.0}
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
        "| m | san | 3.00 % | 30.0 ± 14.1 | 50.0 ± 0.0 | 90.0 ± 0.0 | 40.0 | 90.0 | 56.7 |"
    )
    assert short[3] == "| m | lora | 5.00 % |  |  | 80.0 ± 0.0 |  | 80.0 |  |"
    lines = [line | {"options": {"epochs": 9 - line["seed"], "lr": None}} for line in lines]
    rows = tables.tables(lines).split("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [
        "san, epochs 9",
        "san, epochs 8",
        "lora, epochs 9",
    ]
    with pytest.raises(ValueError, match="no run to tabulate"):
        tables.tables([])


def test_rates_that_were_tried_alone_give_a_table_of_validation(tmp_path):
    lines = searched(tmp_path, seeds=0)[1]
    assert {line["part"] for line in lines} == {"search"}
    lines += [line | {"task": "b", "val": None if line["lr"] == 2 else 0.5} for line in lines]
    lines += [line | {"method": "ssf", "val": None} for line in lines]
    rows = tables.tables(lines).splitlines()
    assert rows[0] == "| model | method | a | b | mean |"
    best = max(line["val"] for line in lines[:3])
    assert rows[2] == f"| m | san | {100 * best:.1f} at 2 | 50.0 at 1 | {50 * best + 25:.1f} |"
    assert rows[3] == "| m | ssf |  |  |  |"


def test_mean_and_standard_deviation_over_seeds():
    assert tables.spread([0.50, 0.52, 0.57]) == "53.0 ± 3.6"


def test_what_a_task_is_scored_by_besides_stands_below_without_a_mean():
    line = scored("san", torch.tensor([[True, False]]))[0]
    line |= {"task": "scenes", "parts": {"GQA": 0.25, "POPE": 0.75, "POPE F1": 0.6}}
    line |= {"options": {"tasks": ["GQA", "POPE"]}}
    del line["right"]
    above, below = tables.tables([line]).split("\nbeside:\n\n")
    assert above.startswith("| model | method | trained | GQA | POPE | mean |")
    below = below.splitlines()
    assert below[0] == "| model | method | trained | POPE F1 |" and "| 60.0 ± 0.0 |" in below[2]


# -------------------------------------------------------------------------------- against SAN


def scored(method: str, hits: torch.Tensor, task="a", **changes) -> list[dict]:
    """A line per seed: hits is seeds×pictures."""
    line = FIGURES | {"task": task, "model": "m", "method": method, "part": "test", "lr": 0.1}
    line |= {"merge_same": 1.0, "merge_difference": 0.0, "options": {"lr": None}}
    return [
        line
        | {"seed": k, "val": 0.5, "test": row.double().mean().item(), "right": paired.pack(row)}
        | changes
        for k, row in enumerate(hits)
    ]


def drawn(generator, share: float, seeds=3, pictures=200, same=0.5) -> torch.Tensor:
    """Hits with a probability; `same`: the share of pictures that all seeds answer alike."""
    hits = torch.rand(seeds, pictures, generator=generator) < share
    alike = torch.rand(pictures, generator=generator) < same
    return torch.where(alike, hits[0], hits)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def difference(lines: list[dict]) -> paired.Interval:
    (pair,) = paired.differences(lines).values()
    return pair.difference


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 2000])
def test_hits_come_back_from_their_text(count, generator):
    hits = torch.rand(count, generator=generator) < 0.3
    text = json.loads(json.dumps(paired.pack(hits)))
    assert torch.equal(paired.unpack(text), hits) and paired.unpack(text).dtype == torch.bool
    assert len(text) < count / 5.9 + 10


def test_parts_of_an_answer_come_back_from_their_text():
    worth = torch.tensor([0, 1 / 3, 2 / 3, 1, 0.2])
    text = paired.pack(worth)
    assert torch.allclose(paired.unpack(text), worth.double()) and text.startswith("5/255:")


@pytest.mark.parametrize(
    "text", ["", "9:AA==", "8:A", "x:AA==", "8:??==", "8/255:AA==", "1/3:AA=="]
)
def test_a_broken_text_of_hits_is_called_so(text):
    with pytest.raises(ValueError, match="'right' is broken"):
        paired.unpack(text)


def test_the_paired_difference_is_the_one_computed_step_by_step(generator):
    """Against a bootstrap of plain loops over drawn indices, with other numbers drawn."""
    sizes = {"a": 40, "b": 25}
    hits = {
        (method, task): drawn(generator, share, pictures=size)
        for method, share in (("san", 0.6), ("lora", 0.7))
        for task, size in sizes.items()
    }
    lines = [line for (method, task), own in hits.items() for line in scored(method, own, task)]
    (pair,) = paired.differences(lines).values()
    own = {t: (hits["lora", t].double() - hits["san", t].double()).tolist() for t in sizes}
    draws = {task: [] for task in (*sizes, "mean")}
    for _ in range(1500):
        seeds = torch.randint(3, (3,), generator=generator).tolist()
        for task, n in sizes.items():
            chosen = torch.randint(n, (n,), generator=generator).tolist()
            values = [own[task][k][i] for k in seeds for i in chosen]
            draws[task].append(sum(values) / len(values))
        draws["mean"].append(sum(draws[task][-1] for task in sizes) / 2)
    for name, found in (*pair.tasks.items(), ("mean", pair.difference)):
        exact = [statistics.mean(sum(own[t], [])) for t in ([name] if name in sizes else sizes)]
        assert found.value == pytest.approx(statistics.mean(exact), abs=1e-12)
        order = sorted(draws[name])
        assert found.low == pytest.approx(order[37], abs=0.025)
        assert found.high == pytest.approx(order[-38], abs=0.025)
        assert found.high - found.low > 0.1
    assert paired.differences(lines) == paired.differences(lines)  # its own generator


def test_resampled_pictures_have_the_mean_and_the_variance_of_drawing_each(generator):
    values = torch.randint(-1, 2, (3, 50), generator=generator).double()
    means = paired.resampled(values, generator)
    assert means.shape == (paired.DRAWS, 3)
    covariance = values.cov(correction=0) / 50  # drawn together, seeds keep their likeness
    assert (means.mean(0) - values.mean(1)).abs().max() < 0.01
    assert (means.T.cov() - covariance).abs().max() < 0.15 * covariance.diag().max()


def test_of_equal_methods_about_19_intervals_in_20_hold_0(generator, monkeypatch):
    """Where seeds answer most pictures alike, as after fine-tuning; else intervals are wider."""
    monkeypatch.setattr(paired, "DRAWS", 400)
    found = [
        difference(
            scored("san", drawn(generator, 0.6, same=0.9))
            + scored("lora", drawn(generator, 0.6, same=0.9))
        )
        for _ in range(200)
    ]
    level = sum(one.verdict == "level" for one in found)
    assert 180 <= level <= 199
    assert all(0.1 < one.high - one.low < 0.3 for one in found)  # 2 · 1.96 · √(0.48 / 200) = 0.19


def test_a_method_5_points_ahead_is_called_so_and_the_other_way_round(generator):
    for shares, verdict in (((0.6, 0.65), "ahead"), ((0.65, 0.6), "behind")):
        hits = [drawn(generator, share, pictures=10_000) for share in shares]
        found = difference(scored("san", hits[0]) + scored("lora", hits[1]))
        assert found.verdict == verdict and found.to_decide == "—"
        assert abs(abs(found.value) - 0.05) < 0.02


def test_pairs_are_of_the_same_seeds_tasks_options_and_model(generator):
    san, lora = drawn(generator, 0.6), drawn(generator, 0.7)
    lines = scored("san", san) + scored("lora", lora)
    expected = difference(lines)
    more = [
        *scored("lora", drawn(generator, 0.1), task="b"),  # where SAN is missing
        *scored("lora", drawn(generator, 0.1), options={"lr": 9}),
        *scored("lora", drawn(generator, 0.1), model="n"),
        *scored("lora", drawn(generator, 0.1, seeds=4))[3:],  # a seed that SAN lacks
    ]
    more += [line | {"part": "search", "val": 0.0} for line in scored("san", ~san)]
    assert difference([*more, *lines[::-1]]) == expected
    assert difference(scored("san", ~san) + lines) == expected  # of a run done twice the last
    shuffled = scored("lora", lora[[1, 2, 0]])
    assert difference(lines[:3] + shuffled).value == pytest.approx(expected.value)
    assert difference(lines[:3] + shuffled) != expected
    with pytest.raises(ValueError, match="same test examples"):
        paired.differences(lines[:3] + scored("lora", lora[:, :-1]))


def test_an_interval_says_in_points_what_is_decided_and_what_would():
    found = paired.Interval(-0.008, -0.013, -0.002)
    assert str(found) == "−0.8 [−1.3, −0.2]"
    assert (found.verdict, found.to_decide) == ("behind", "—")
    found = paired.Interval(0.004, -0.002, 0.009)
    assert str(found) == "+0.4 [−0.2, +0.9]"
    assert (found.verdict, found.to_decide) == ("level", "× 2.2")  # (0.6 / 0.4)²
    assert paired.Interval(-0.001, -0.009, 0.011).to_decide == "× 144"
    assert paired.Interval(0.0, -0.009, 0.01).to_decide == "× ∞"
    assert paired.Interval(0.01, 0.001, 0.02).verdict == "ahead"


def test_a_third_table_holds_the_methods_against_san(generator):
    san, lora = drawn(generator, 0.9), drawn(generator, 0.5)
    lines = [
        *scored("full", drawn(generator, 0.6), seconds=2.0, trainable=4000),
        *scored("lora", lora, seconds=0.5),
        *scored("san", san),
        *scored("ssf", drawn(generator, 0.9), task="b"),  # not scored where SAN was
    ]
    text = tables.tables(lines)
    _, second, third, note = text.split("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in third.splitlines()]
    columns = ["model", "method", "tasks", "mean", "difference to SAN", "verdict"]
    columns += ["data to decide", "trained", "s/epoch, full = 1", "peak MB"]
    assert rows[0] == columns and [row[1] for row in rows[2:]] == ["full", "lora", "san"]
    own = difference(lines[3:9])
    mean = f"{100 * lora.double().mean().item():.1f}"
    assert rows[3] == ["m", "lora", "1", mean, str(own), "behind", "—", "5", "0.25", "9"]
    assert rows[4][4:] == ["", "", "", "5", "0.50", "9"] and rows[2][7:9] == ["4,000", "1.00"]
    assert str(own) in second and "95 %" in note
    ablation = [line | {"method": "both, shift (SAN)"} for line in scored("san", san)]
    ablation += scored("both", lora)
    assert tables.tables(ablation).count(str(own)) == 2
    for line in ablation:  # together, either has its own SAN
        line["options"] = line["options"] | {"ablation": True}
    assert tables.tables(lines[3:9] + ablation).count(str(own)) == 4


def test_lines_that_do_not_tell_which_pictures_were_right_have_two_tables(generator):
    lines = scored("san", drawn(generator, 0.9)) + scored("lora", drawn(generator, 0.9))
    assert "difference" in tables.tables(lines)
    for line in lines[:3]:  # SAN's, made before
        del line["right"]
    text = tables.tables(lines)
    assert text.count("\n\n") == 1 and "difference" not in text


def test_the_long_table_tells_how_many_rates_were_tried_and_an_end(generator):
    lines = scored("san", drawn(generator, 0.9))
    assert tables.detail(lines, [])["rates tried"] == ""
    assert tables.detail(lines, [0.1])["rates tried"] == "1"
    assert tables.detail(lines, [0.01, 0.1, 1])["rates tried"] == "3"
    assert tables.detail(lines, [0.01, 0.1, 0.001])["rates tried"] == "3, end of grid"
    tries = [line | {"part": "search", "lr": lr} for line in lines[:1] for lr in (0.01, 0.1)]
    assert "| 0.1 | 2, end of grid |" in tables.tables(tries + lines)
