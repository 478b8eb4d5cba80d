"""Many runs: a learning rate searched for each method, results kept run by run, tables of them."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lab import loop


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.exists() else ""
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror}") from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a last line that the power or the disk cut off
            loop.write_text(whole, path)
        self.path, self.options, self.lines = path, options, read_results(path)

    def find(self, key: dict) -> list[dict]:
        """The lines that hold all of `key`, and were made with these options."""
        key = key | {"options": self.options}
        return [line for line in self.lines if key.items() <= line.items()]

    def add(self, line: dict) -> dict:
        """Append a line, with the options. Raises OSError if it cannot be written."""
        line = line | {"options": self.options}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def read_results(path: Path) -> list[dict]:
    """The lines of a Journal's file; none if it is not there. Raises OSError if it is broken."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        needed = {"task", "model", "method", "part", "lr", "seed", "val", "options"}
        if any(needed - line.keys() for line in lines):
            raise ValueError("a line lacks entries")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, AttributeError) as error:
        raise OSError(f"{path} is broken ({error}); move it away and start again") from error
    return lines


def search(
    args: argparse.Namespace,
    key: dict,
    rates: Iterable[float],
    train: Callable[[argparse.Namespace, str, bool], tuple[nn.Module, dict]],
    test: Callable[[nn.Module], tuple[Tensor, dict]],
    journal: Journal,
    again: bool = False,
) -> list[dict]:
    """Choose a learning rate on validation, then train and score with every seed.

    Returns the journal's lines of the scored runs.

    key: the task, model and method; rates: those to choose from.
    train(args, note, last): a model and its figures, at args.lr and args.seed; note: what to call
    the run; last is False while rates are tried. test: as for `loop.score_and_merge`.
    Every rate is tried with seed 0; the best by validation is scored on the test split, then the
    other seeds; again: the best is trained anew with seed 0 too, since its last training differs.
    A rate at which the loss does not stay finite is out, and recorded with val None.
    """

    def trained(rate: float, seed: int, last: bool) -> tuple[nn.Module, dict]:
        note = f"{key['model']} {key['method']} seed {seed}"
        model, figures = train(loop.changed(args, lr=rate, seed=seed), note, last)
        model.zero_grad()  # the best is kept while others train: without its gradients
        if figures["val"] is not None:
            print(f"  validation {100 * figures['val']:.1f} %", flush=True)
        return model, figures

    kept, tried = None, {}
    for rate in rates:
        run = key | {"part": "search", "lr": rate, "seed": 0}
        if not (lines := journal.find(run)):
            try:
                model, figures = trained(rate, 0, last=False)
            except FloatingPointError as error:
                model, figures = None, {"val": None}
                print(f"  {error}")
            lines = [journal.add(run | figures)]
            if figures["val"] is not None and figures["val"] > max(tried.values(), default=-1):
                kept = rate, model, figures
        if lines[0]["val"] is not None:
            tried[rate] = lines[0]["val"]
    if not tried:
        raise FloatingPointError(f"{key['method']} stayed finite at no learning rate of {rates}")
    rate, scored = max(tried, key=tried.get), []
    for seed in range(args.seeds):
        run = key | {"part": "test", "lr": rate, "seed": seed}
        if lines := journal.find(run):
            scored.append(lines[-1])
            continue
        if seed == 0 and kept and kept[0] == rate and not again:
            _, model, figures = kept
        else:
            model, figures = trained(rate, seed, last=True)
        scored.append(journal.add(run | figures | loop.score_and_merge(model, test)))
    return scored


def journal_of(args: argparse.Namespace, out: Path) -> Journal:
    """The journal of a comparison in the folder `out`. Raises OSError as `Journal`."""
    options = loop.settings(args) | dict.fromkeys(("task", "model", "method", "seeds"))
    return Journal(out / "results.jsonl", options)


def save_tables(lines: list[dict], out: Path) -> None:
    """Print the tables of a comparison's lines, below its command, and keep them in table.md."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"`{command}`\n\n{tables(lines)}"
    loop.write_text(text, out / "table.md")
    print(f"\n{text}\nsaved {out / 'table.md'}")


def print_tables(args: argparse.Namespace) -> None:
    """Print the tables of args.table, comparisons' folders or files, together. Raises OSError."""
    paths = [Path(run) / "results.jsonl" if Path(run).is_dir() else Path(run) for run in args.table]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give a comparison's folder")
    print(tables([line for path in paths for line in read_results(path)]))


def tables(lines: list[dict]) -> str:
    """Two Markdown tables of a Journal's lines: a row for each method, and for each task of it.

    The first has the mean over all tasks, and over those of each group if the lines name groups;
    it stays empty for a method that lacks one of them. Runs with other options have rows of their
    own, which name what differs. Raises ValueError if no run is scored.
    """
    lines = [line for line in lines if line["part"] == "test"]
    if not lines:
        raise ValueError("there is no scored run to tabulate")
    options = [line["options"] for line in lines]
    differ = [k for k in options[0] if any(own.get(k) != options[0][k] for own in options)]
    runs: dict[tuple, dict[str, dict]] = {}  # model and method → task → seed → line
    for line in lines:
        own = [f"{key} {line['options'].get(key)}" for key in differ]
        by_task = runs.setdefault((line["model"], ", ".join([line["method"], *own])), {})
        by_task.setdefault(line["task"], {})[line["seed"]] = line
    group_of = {line["task"]: line.get("group") for line in lines}
    means = {group: [t for t in group_of if group_of[t] == group] for group in group_of.values()}
    means = {g: own for g, own in means.items() if g} | {"mean": list(group_of)}
    means = means if len(group_of) > 1 else {}
    short, long = [], []
    for (model, method), by_task in runs.items():
        seeds = {task: list(own.values()) for task, own in by_task.items()}
        accuracies = {task: [run["test"] for run in own] for task, own in seeds.items()}
        percent = next(iter(seeds.values()))[0]["percent"]
        row = {"model": model, "method": method, "trained": f"{percent:.2f} %"}
        row |= {t: spread(accuracies[t]) if t in accuracies else "" for t in group_of}
        for name, own in means.items():
            whole = all(task in accuracies for task in own)
            each = [statistics.mean(accuracies[task]) for task in own] if whole else []
            row[name] = f"{100 * statistics.mean(each):.1f}" if whole else ""
        short.append(row)
        long += [detail(own) | {"method": method} for own in seeds.values()]
    return markdown(short) + "\n" + markdown(long)


def detail(runs: list[dict]) -> dict[str, str]:
    """The columns of one method on one task: `runs` are its scored seeds."""
    same = min(run["merge_same"] for run in runs)
    gap = max(run["merge_difference"] for run in runs)
    return {
        **{name: runs[0][name] for name in ("model", "task", "method")},
        **{k: spread([run["parts"][k] for run in runs]) for k in runs[0].get("parts", [])},
        "test accuracy, %": spread([run["test"] for run in runs]),
        "trained": f"{runs[0]['trainable']:,} ({runs[0]['percent']:.2f} %)",
        "lr": f"{runs[0]['lr']:g}",
        "s/epoch": f"{min(run['seconds'] for run in runs):.2f}",
        "peak MB": f"{max(run['memory'] for run in runs):.0f}",
        "merged = adapted": f"{100 * same:.1f} %, {gap:.0e}",
    }


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(values: list[float]) -> str:
    """Per cent, mean ± standard deviation (n − 1) of shares: '54.1 ± 0.8'."""
    tensor = torch.tensor(values, dtype=torch.float64) * 100
    deviation = tensor.std().item() if len(values) > 1 else 0.0
    return f"{tensor.mean().item():.1f} ± {deviation:.1f}"
