"""Many runs: a learning rate searched for each method, results kept run by run, tables of them."""

import argparse
import errno
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lab import loop, paired, saved
from lab.paired import Key, Paired

WIDEN = 2  # rates that a search may add to its grid
NOTE = (
    "Differences in points, with 95 % intervals over test examples and seeds; tasks and backbones "
    "are taken as they are. level: not decided, and about how many times the data would decide it. "
    "s/epoch tells something where the runs had the machine to themselves."
)


class Journal:
    """A file of results, one JSON line per run; what is in it need not be done again.

    A line holds a run's task, model and method, its part (search: a learning rate tried, or test:
    scored on the test split), lr, seed, its figures, and the options it was made with. Lines are
    only ever appended, so that several commands can write to one file at once.
    """

    def __init__(self, path: Path, options: dict):
        """options: what lines must have been made with to count here.

        Raises OSError if the file is broken or its folder cannot be made.
        """
        self.path, self.options = path, loop.as_now(options)
        self.lines = []
        if path.exists():
            with self.held():
                self.lines = read_results(path)

    @contextmanager
    def held(self) -> Iterator[BinaryIO]:
        """The file, which ends in a whole line, while no other command writes. Raises OSError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file, loop.holding(self.path, wait=True):
                file.seek(0)
                content = file.read()
                if (whole := content.rfind(b"\n") + 1) != len(content):
                    file.truncate(whole)  # what follows was cut off by the power or the disk
                yield file
        except OSError as error:
            if error.strerror is None:  # it is a sentence already
                raise
            raise OSError(f"could not write {self.path}: {error.strerror}") from error

    def find(self, key: dict) -> list[dict]:
        """The lines that hold all of `key`, and were made with these options."""
        key = key | {"options": self.options}
        return [line for line in self.lines if key.items() <= line.items()]

    def add(self, line: dict) -> dict:
        """Append a line, with the options. Raises OSError if it cannot be written."""
        line = line | {"options": self.options}
        content = (json.dumps(line) + "\n").encode()
        with self.held() as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines.append(line)
        return line


def read_results(path: Path) -> list[dict]:
    """The lines of a Journal's file; none if it is not there. Raises OSError if it is broken.

    Their options are as loop.as_now has them.
    """
    try:
        lines = saved.results(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [line | {"options": loop.as_now(line["options"])} for line in lines]


def search(
    args: argparse.Namespace,
    key: dict,
    rates: Iterable[float],
    train: Callable[[argparse.Namespace, str, bool], tuple[nn.Module, dict]],
    test: Callable[[nn.Module], tuple[Tensor, dict]],
    journal: Journal,
    again: bool = False,
    check: Callable[[nn.Module], Tensor] | None = None,
) -> list[dict]:
    """Choose a learning rate on validation, then train and score with every seed.

    Returns the journal's lines of all that: rates tried, and scored runs.

    key: the task, model and method; rates: those to choose from.
    train(args, note, last): a model and its figures, at args.lr and args.seed; note: what to call
    the run; last is False while rates are tried. test, check: as for `loop.score_and_merge`.
    Every rate is tried with seed 0. While the best by validation is the lowest or the highest, the
    next one `beyond` is tried as well, WIDEN at most and none where one rate is given. The best is
    scored on the test split, then the other seeds; again: the best is trained anew with seed 0 too,
    since its last training differs.
    A rate at which the loss does not stay finite is worse than all, and recorded with val None.
    A line's wall is the seconds that its run took, with scoring where it is scored.
    """

    def trained(rate: float, seed: int, last: bool) -> tuple[nn.Module, dict]:
        note, started = f"{key['model']} {key['method']} seed {seed}", time.perf_counter()
        model, figures = train(loop.changed(args, lr=rate, seed=seed), note, last)
        model.zero_grad()  # the best is kept while others train: without its gradients
        if figures["val"] is not None:
            print(f"  validation {100 * figures['val']:.1f} %", flush=True)
        return model, figures | {"wall": time.perf_counter() - started}

    rates, tried, lines, kept = [*dict.fromkeys(rates)], {}, [], None
    most = len(rates) + WIDEN if len(rates) > 1 else 1
    while len(tried) < len(rates):
        rate, model = rates[len(tried)], None
        run = key | {"part": "search", "lr": rate, "seed": 0}
        if not (found := journal.find(run)):
            try:
                model, figures = trained(rate, 0, last=False)
            except FloatingPointError as error:
                figures = {"val": None}
                print(f"  {error}")
            found = [journal.add(run | figures)]
        lines.append(found[0])
        tried[rate] = -math.inf if found[0]["val"] is None else found[0]["val"]
        if model and choice(tried) == rate:
            kept = rate, model, figures
        if len(tried) == len(rates) < most and (further := beyond(tried)):
            print(f"  the best rate, {choice(tried):g}, is the grid's end: trying {further:g} too")
            rates.append(further)
    rate = choice(tried)
    if tried[rate] == -math.inf:
        raise FloatingPointError(f"{key['method']} stayed finite at no learning rate of {rates}")
    for seed in range(args.seeds):
        run = key | {"part": "test", "lr": rate, "seed": seed}
        if found := journal.find(run):
            lines.append(found[-1])
            continue
        if seed == 0 and kept and kept[0] == rate and not again:
            _, model, figures = kept
        else:
            model, figures = trained(rate, seed, last=True)
        started = time.perf_counter()
        scores = loop.score_and_merge(model, test, check)
        wall = figures["wall"] + time.perf_counter() - started
        lines.append(journal.add(run | figures | scores | {"wall": wall}))
    return lines


def choice(tried: dict[float, float]) -> float:
    """The rate with the best validation accuracy; of equals, the nearest to the grid's middle."""
    grid = sorted(tried)
    return max(grid, key=lambda rate: (tried[rate], -abs(2 * grid.index(rate) - len(grid) + 1)))


def beyond(tried: dict[float, float]) -> float | None:
    """The half decade, 1 or 3 · 10ᵏ, past the end of the grid where the best rate lies.

    tried: rate → validation accuracy. None if the best is no end, or no rate stayed finite. Past
    0.02 and 0.03 lies 0.1, below 0.001 lies 0.0003.
    """
    best = choice(tried)
    if best not in (min(tried), max(tried)) or tried[best] == -math.inf:
        return None
    halves = round(2 * math.log10(best) + (1 if best == max(tried) else -1))
    return float(f"{3 if halves % 2 else 1}e{halves // 2}")


def announce(
    searches: list[tuple[dict, list[float]]],
    args: argparse.Namespace,
    journal: Journal,
    time_step: Callable[[str], tuple[float, int]],
) -> None:
    """Print how many runs the journal leaves to do, and about how long they take.

    searches: each one's key and rates; how a grid will be widened is not foreseen.
    A model's run takes as long as its runs in the journal do on average. Where there is none,
    time_step(model) gives the seconds of a training step and how many a run has; validation and
    scoring come on top.
    """
    left = Counter()
    for key, rates in searches:
        tried = {line["lr"] for line in journal.find(key | {"part": "search"})}
        scored = {line["seed"] for line in journal.find(key | {"part": "test"})}
        left[key["model"]] += len({*rates} - tried) + len({*range(args.seeds)} - scored)
    seconds, paces = 0.0, []
    for model, runs in (+left).items():
        if walls := [line["wall"] for line in journal.find({"model": model}) if "wall" in line]:
            each = statistics.mean(walls)
            paces.append(f"{each:.3g} s per run of {model} so far")
        else:
            step, steps = time_step(model)
            each = step * steps
            paces.append(f"{step:.2g} s per step of {model}")
        seconds += runs * each
    if paces:
        runs = f"about {left.total()} runs of {args.epochs} epochs"
        print(f"{runs}, {loop.duration(seconds)} at {', '.join(paces)}", flush=True)


@contextmanager
def journal_of(args: argparse.Namespace, out: Path) -> Iterator[Journal]:
    """The journal of a comparison in the folder `out`, which is held. Raises OSError as `Journal`.

    Other comparisons may write into the same folder at once, but no single run.
    """
    options = loop.settings(args) | dict.fromkeys(("task", "model", "method", "seeds"))
    with loop.holding(out, shared=True):
        yield Journal(out / "results.jsonl", options)


def save_tables(lines: list[dict], out: Path) -> None:
    """Print the tables of a comparison's lines, below its command, and keep them in table.md."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"`{command}`\n\n{tables(lines)}"
    loop.write_text(text, out / "table.md")
    print(f"\n{text}\nsaved {out / 'table.md'}")


def print_tables(args: argparse.Namespace) -> None:
    """Print the tables of args.table, comparisons' folders or files, together.

    Raises OSError for a file that is missing or broken, ValueError for one of another kind.
    With args.seeds 0 it is the table of validation, even where runs were scored.
    """
    paths = [Path(run) / "results.jsonl" if Path(run).is_dir() else Path(run) for run in args.table]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give a comparison's folder")
        if path.suffix != ".jsonl":
            raise ValueError(f"{path} is no results.jsonl; give a comparison's folder")
    lines = [line for path in paths for line in read_results(path)]
    print(tables([line for line in lines if args.seeds or line["part"] == "search"]))


def for_each_task(lines: list[dict]) -> list[dict]:
    """Lines of which each is of one task: one of several tasks, learned together, becomes several.

    test, test_norm and, where it is told, right are then the task's own; all else is the run's.
    """
    own = {"test": "parts", "test_norm": "parts_norm", "right": "parts_right"}
    return [
        line
        | {"task": task}
        | {key: line[parts][task] for key, parts in own.items() if task in line.get(parts, {})}
        for line in lines
        for task in line["options"].get("tasks", [line["task"]])
    ]


def besides(lines: list[dict]) -> list[dict]:
    """Lines of the scores that a run has beside its tasks', such as POPE's F1."""
    return [
        line | {"task": part, "test": share}
        for line in lines
        for part, share in line.get("parts", {}).items()
        if part not in line["options"].get("tasks", [part])
    ]


def tables(lines: list[dict]) -> str:
    """Markdown tables of a Journal's lines: a row for each method, and for each task of it.

    The first has the mean over all tasks, and over those of each group if the lines name groups;
    it stays empty for a method that lacks one of them. Where options have several words, the same
    follows of accuracy by length, and where tasks have scores `besides`, of these. The last, where
    lines tell which answers were right, holds the methods against SAN. Runs with other options have
    rows of their own, which name what differs. If no run is scored, it is a table of validation.
    Raises ValueError for no lines at all.
    """
    if not lines:
        raise ValueError("there is no run to tabulate")
    if all(line["part"] == "search" for line in lines):  # validated on all of a run's tasks at once
        return markdown(validated(paired.runs_of(lines, "search", "lr")))
    beside = besides(lines)
    lines = for_each_task(lines)
    runs, tried = paired.runs_of(lines, "test", "seed"), paired.runs_of(lines, "search", "lr")
    labels, pairs = paired.labels_of(runs), paired.differences(lines)
    long = []
    for key, own in runs.items():
        for task, seeds in own.items():
            rates = [*tried.get(key, {}).get(task, {})]
            row = detail([*seeds.values()], rates) | {"method": labels[key]}
            if pairs:
                row["difference to SAN"] = pairs[key].tasks.get(task, "") if key in pairs else ""
            long.append(row)
    text = overview(lines)
    if by_length := [line | {"test": line["test_norm"]} for line in lines if "test_norm" in line]:
        text += f"\nby length:\n\n{overview(by_length)}"
    if beside:
        text += f"\nbeside:\n\n{overview(beside, mean=False)}"
    text += f"\n{markdown(long)}"
    if pairs:
        text += f"\n{markdown(beside_san(runs, pairs))}\n{NOTE}\n"
    return text


def overview(lines: list[dict], mean: bool = True) -> str:
    """The table of methods and tasks, and, if asked for, of the means over tasks.

    trained: the share of the parameters, a mean over the row's tasks.
    """
    runs, rows = paired.runs_of(lines, "test", "seed"), []
    labels = paired.labels_of(runs)
    group_of = {line["task"]: line.get("group") for line in lines if line["part"] == "test"}
    means = {group: [t for t in group_of if group_of[t] == group] for group in group_of.values()}
    means = {g: own for g, own in means.items() if g} | {"mean": list(group_of)}
    means = means if mean and len(group_of) > 1 else {}
    for key, own in runs.items():
        seeds = {task: list(by_seed.values()) for task, by_seed in own.items()}
        accuracies = {task: [run["test"] for run in of] for task, of in seeds.items()}
        percent = statistics.mean(of[0]["percent"] for of in seeds.values())  # heads differ by task
        row = {"model": key[0], "method": labels[key], "trained": f"{percent:.2f} %"}
        row |= {t: spread(accuracies[t]) if t in accuracies else "" for t in group_of}
        for name, of in means.items():
            whole = all(task in accuracies for task in of)
            each = [statistics.mean(accuracies[task]) for task in of] if whole else []
            row[name] = f"{100 * statistics.mean(each):.1f}" if whole else ""
        rows.append(row)
    return markdown(rows)


def validated(tried: dict[Key, dict]) -> list[dict]:
    """The rows of a table of rates that were tried: the best validation accuracy, and its rate."""
    rows, labels = [], paired.labels_of(tried)
    tasks = dict.fromkeys(task for by_task in tried.values() for task in by_task)
    for key, by_task in tried.items():
        row, best = {"model": key[0], "method": labels[key]}, []
        for task in tasks:
            values = {lr: line["val"] for lr, line in by_task.get(task, {}).items()}
            values = {lr: val for lr, val in values.items() if val is not None}
            row[task] = ""
            if values:
                best.append(values[lr := choice(values)])
                row[task] = f"{100 * best[-1]:.1f} at {lr:g}"
        mean = f"{100 * statistics.mean(best):.1f}" if len(best) == len(tasks) else ""
        rows.append(row | {"mean": mean})
    return rows


def detail(runs: list[dict], tried: list[float]) -> dict[str, str]:
    """The columns of one method on one task: its scored seeds, and the learning rates tried."""
    same = min(run["merge_same"] for run in runs)
    gap = max(run["merge_difference"] for run in runs)
    at_end = len(tried) > 1 and runs[-1]["lr"] in (min(tried), max(tried))
    by_length, error = [run["test_norm"] for run in runs if "test_norm" in run], ""
    if "right" in runs[0] and runs[0]["options"].get("test_shots"):
        count = len(paired.unpack(runs[0]["right"]))
        error = f"{count}, ± {binomial(statistics.mean(run['test'] for run in runs), count)}"
    return {
        **{name: runs[0][name] for name in ("model", "task", "method")},
        "test accuracy, %": spread([run["test"] for run in runs]),
        **({"by length, %": spread(by_length)} if by_length else {}),
        **({"questions, error": error} if error else {}),
        "trained": f"{runs[0]['trainable']:,} ({runs[0]['percent']:.2f} %)",
        "lr": f"{runs[-1]['lr']:g}",
        "rates tried": (f"{len(tried)}" if tried else "") + (", end of grid" if at_end else ""),
        "s/epoch": f"{min(run['seconds'] for run in runs):.2f}",
        "peak MB": f"{max(run['memory'] for run in runs):.0f}",
        "merged = adapted": f"{100 * same:.1f} %, {gap:.0e}",
    }


def binomial(share: float, count: int) -> str:
    """Per cent, the standard error √(p (1 − p) / n) of a share p of n questions drawn at random."""
    return f"{100 * (share * (1 - share) / count) ** 0.5:.1f}"


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table; what a row does not have stays empty."""
    names = [*dict.fromkeys(name for row in rows for name in row)]
    lines = [names, ["---"] * len(names), *([row.get(n, "") for n in names] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: list[float]) -> str:
    """Per cent, mean ± standard deviation (n − 1) of shares: '54.1 ± 0.8'."""
    tensor = torch.tensor(values, dtype=torch.float64) * 100
    deviation = tensor.std().item() if len(values) > 1 else 0.0
    return f"{tensor.mean().item():.1f} ± {deviation:.1f}"


def beside_san(runs: dict[Key, dict], pairs: dict[Key, Paired]) -> list[dict]:
    """The rows of the table against SAN, SAN's own among them; times are relative to full's."""

    def seconds(by_task: dict[str, dict]) -> float:
        return sum(min(run["seconds"] for run in by_task[task].values()) for task in tasks)

    rows, labels = [], paired.labels_of(runs)
    for key, by_task in runs.items():
        compared = [key] if key in pairs else [p for p in pairs if p == (key[0], p[1], key[2])]
        if key not in pairs and key[1] not in paired.SAN:
            continue
        tasks = [task for task in by_task if any(task in pairs[p].tasks for p in compared)]
        if not tasks:
            continue
        difference = pairs[key].difference if key in pairs else None
        own = [[*by_task[task].values()] for task in tasks]
        mean = statistics.mean(statistics.mean(run["test"] for run in seeds) for seeds in own)
        trained = statistics.mean(seeds[0]["trainable"] for seeds in own)
        full = runs.get((key[0], "full", key[2]), {})
        relative = seconds(by_task) / seconds(full) if {*tasks} <= full.keys() else None
        rows.append(
            {
                "model": key[0],
                "method": labels[key],
                "tasks": len(tasks),
                "mean": f"{100 * mean:.1f}",
                "difference to SAN": difference or "",
                "verdict": difference.verdict if difference else "",
                "data to decide": difference.to_decide if difference else "",
                "trained": f"{trained:,.0f}",
                "s/epoch, full = 1": "" if relative is None else f"{relative:.2f}",
                "peak MB": f"{max(run['memory'] for seeds in own for run in seeds):.0f}",
            }
        )
    return rows
