"""Pictures of saved runs and of comparisons: python train_vision.py --plot RUN… [--out DIR].

    curves.png    validation accuracy and training loss by epoch, all runs together
    accuracy.png  a comparison's methods: test accuracy against trained parameters
    forest.png    a comparison's methods: test accuracy less SAN's, with 95 % intervals
    gamma.png     every layer's γ: its histogram, and its channels from depressed to potentiated
    change.png    ‖W* − W‖ / ‖W‖ of every layer, all runs together

A RUN is the folder of one training run or of a comparison. One function per picture gives it as a
matplotlib Figure, or None where the runs hold nothing for it; `draw` writes them. A method looks
the same in all of them, and is told from the others in grey as well: by dashes and marker.
"""

import itertools
import json
import math
import statistics
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import san
from lab import loop, paired, saved, tables

if TYPE_CHECKING:  # an extra, imported where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
# method, or variant of --ablation → colour, which dashes, marker; colours are apart without red or
# green cones too
STYLES = {
    "linear": ("#969696", 2, "v"),
    "bias": ("#284608", 3, "<"),
    "vpt": ("#c1a7df", 4, "P"),
    "full": ("#1a1a1a", 3, "D"),
    "norm": ("#a0b85a", 2, ">"),
    "ia3": ("#b09070", 2, "*"),
    "hyperadapt": ("#892e53", 3, "X"),
    "san2": ("#c34d00", 4, "p"),
    "lora, r=1": ("#55a0ff", 2, "s"),
    "lora": ("#3a86c0", 1, "s"),
    "dora": ("#3b8399", 4, "d"),
    "ssf": ("#eda02c", 1, "^"),
    "san": ("#b2182b", 0, "o"),
    "san+lora": ("#600058", 0, "s"),
    "san+dora": ("#7e1391", 0, "d"),
    "both, shift (SAN)": ("#b2182b", 0, "o"),
    "both": ("#e08a6d", 1, "o"),
    "feature, shift": ("#eda02c", 1, "^"),
    "feature": ("#a8801f", 3, "^"),
    "propagation, shift": ("#3a86c0", 0, "s"),
    "propagation": ("#14456e", 2, "s"),
    "SAN, norms frozen": ("#1a1a1a", 3, "D"),
    "SAN, γ from N(1, 0.02)": ("#969696", 4, "P"),
    "SAN, authors' wiring": ("#c3a5ea", 2, "X"),
}
OTHER = ("#555555", 1, "8")
# a run's name tells these wherever runs differ in them, others only between runs of one method
COMMON = ("dataset", "model", "weights", "image_size", "shots", "epochs", "batch_size", "seed")
ROW, COLUMNS, BINS = 0.17, 300, 40  # inches per layer; pixels of its channels; of its histogram


@dataclass
class Run:
    """What the folder of a finished training run holds."""

    path: Path
    config: dict
    history: list[dict]  # one record per epoch
    result: dict
    links: list[str]  # the linked layers in their order; none but for SAN and SSF
    gamma: dict[str, Tensor]  # layer → γ, one per channel


class Point(NamedTuple):
    """A method in a comparison; mean and deviation of its test accuracy in per cent."""

    label: str
    method: str
    trained: float
    mean: float
    deviation: float


def draw(runs: list[Path], out: Path, base_of: Callable[[dict], dict[str, Tensor]]) -> list[Path]:
    """Draw every picture that the folders `runs` have data for; the files written into `out`.

    base_of(config): the base model's state dict, by a run's config.json, {} where there is none;
    what it raises is passed on. All is drawn before anything is written. Raises OSError for a run
    that is missing or broken and for a picture that cannot be written, ValueError where there is
    nothing to draw or no matplotlib.
    """
    compared = [path for path in runs if (path / "results.jsonl").exists()]
    lines = [line for path in compared for line in tables.read_results(path / "results.jsonl")]
    lines = tables.for_each_task(lines)
    trained = [read_run(path) for path in runs if path not in compared]
    figures = {
        "curves.png": curves(trained),
        "accuracy.png": accuracy(lines),
        "forest.png": forest(lines),
        "gamma.png": gamma(trained),
        "change.png": change(trained, base_of),
    }
    drawn = {out / name: figure for name, figure in figures.items() if figure}
    if not drawn:
        raise ValueError(f"there is nothing to draw in {', '.join(map(str, runs)) or 'no run'}")
    for path, figure in drawn.items():
        san.write(figure, path, save=lambda content, file: content.savefig(file, format="png"))
    return list(drawn)


# --------------------------------------------------------------------- runs, their names and styles


def read_run(path: Path) -> Run:
    """The run in a folder. Raises OSError, naming it, if it is missing, unfinished or broken."""
    try:
        config, (history, result) = saved.config(path), saved.metrics(path)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise OSError(f"{path} is no finished run and no comparison: it has no {name}") from error
    adapter = path / "adapter.pt"
    links, gamma = saved.links_and_gammas(adapter) if adapter.exists() else ([], {})
    return Run(path, config, history, result, links, gamma)


def names(runs: list[Run]) -> list[str]:
    """Labels of runs, by what they were trained on and their settings."""
    settings = []
    for run in runs:
        own = {key: run.result[key] for key in ("method", "dataset", "model")}
        own |= (
            loop.settings(Namespace(**loop.LATER | run.config)) | own | {"task": None}
        )  # dataset says it
        if own.get("warmup_epochs") == own.get("epochs", 0) / 10:  # as it is by default
            del own["warmup_epochs"]
        settings.append(own)
    return labels(settings, [str(run.path) for run in runs])


def labels(settings: list[dict], places: list[str]) -> list[str]:
    """The method and what sets it apart, as in 'san, lr 0.005'; its place if nothing else does."""

    def label(own: dict) -> str:
        same = [other for other in settings if other["method"] == own["method"]]
        words = [own["method"]]
        for key, value in own.items():
            others = settings if key in COMMON else same
            if value is None or all(other.get(key) == value for other in others):
                continue
            name = key.replace("_", " ")
            if key in ("dataset", "model"):
                words.append(str(value))
            elif isinstance(value, bool):
                words.append(name if value else f"no {name}")
            elif key != "method":
                words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(words)

    found = [label(own) for own in settings]
    return [n if found.count(n) == 1 else f"{n} ({place})" for n, place in zip(found, places)]


def styles(methods: list[str]) -> list[dict]:
    """matplotlib's line settings; a look's repetitions are paler, every second one hollow."""
    seen, result = Counter(), []
    for method in methods:
        look = colour, dashes, marker = STYLES.get(method, OTHER)
        again, seen[look] = seen[look], seen[look] + 1
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        colour = tuple(1 - (1 - part) * 0.65**again for part in parts)
        style = {"color": colour, "linestyle": DASHES[(dashes + again) % len(DASHES)]}
        style |= {"marker": marker, "markerfacecolor": "white" if again % 2 else colour}
        result.append(style | {"markersize": 5.5, "linewidth": 1.5})
    return result


# ------------------------------------------------------------------------------------- the pictures


def curves(runs: list[Run]) -> "Figure | None":
    """Validation accuracy and training loss by epoch; the legend tells the test accuracy."""
    runs = [run for run in runs if run.history]
    if not runs:
        return None
    figure = _figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    looks = styles([run.result["method"] for run in runs])
    for run, name, style in zip(runs, names(runs), looks):
        epochs = [record["epoch"] for record in run.history]
        vals = [math.nan if r["val"] is None else 100 * r["val"] for r in run.history]
        step = math.ceil(len(epochs) / 8)
        style |= {"markevery": ((len(epochs) - 1) % step, step)}  # the last epoch among them
        left.plot(epochs, vals, label=f"{name}: test {100 * run.result['test']:.1f} %", **style)
        right.plot(epochs, [record["loss"] for record in run.history], **style)
    right.set_yscale("log")
    _name(left, "validation accuracy", "epoch", "accuracy, %")
    _name(right, "training loss", "epoch", "cross-entropy, nats")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, left.get_lines(), runs)
    return figure


def accuracy(lines: list[dict]) -> "Figure | None":
    """Test accuracy, mean and standard deviation over seeds, against trained parameters.

    lines: those of results.jsonl. A panel for each task of each model where these are four or
    fewer; else a panel per model, with the mean over its tasks.
    """
    tasks: dict[str, dict[str, None]] = {}
    for line in lines:
        tasks.setdefault(line["model"], {})[line["task"]] = None
    panels = [(model, [task]) for model, own in tasks.items() for task in own]
    if len(panels) > 4:
        panels = [(model, [*own]) for model, own in tasks.items()]
    shown = {}
    for model, own in panels:
        if found := points(lines, model, own):
            what = own[0] if len(own) == 1 else f"mean of {len(own)} tasks"
            shown[f"{model}, {what}"] = found
    if not shown:
        return None
    rows = math.ceil(len(shown) / 2)
    figure = _figure(9.5 if len(shown) > 1 else 6.5, 3.9 * rows)
    for i, (title, found) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, min(2, len(shown)), i + 1)
        _name(axes, title, "trained parameters", "test accuracy, %")
        _log(axes, [point.trained for point in found], "{x:,.0f}", room=0.2)
        _marks(axes, found)
    figure.draw_without_rendering()  # settles where everything lies
    figure.set_layout_engine("none")
    for axes, found in zip(figure.axes, shown.values()):
        _label(axes, found)
    return figure


def points(lines: list[dict], model: str, tasks: list[str]) -> list[Point]:
    """A model's methods scored on all of these tasks, by the seeds that all the tasks have."""
    found: dict[tuple, dict] = {}  # method, options → task → seed → line
    for line in lines:
        if line["part"] == "test" and line["model"] == model and line["task"] in tasks:
            key = line["method"], json.dumps(line["options"], sort_keys=True)
            found.setdefault(key, {}).setdefault(line["task"], {})[line["seed"]] = line
    seeds = {key: sorted(set.intersection(*map(set, own.values()))) for key, own in found.items()}
    whole = [key for key in found if len(found[key]) == len(tasks) and seeds[key]]
    settings = [json.loads(options) | {"method": method} for method, options in whole]
    result = []
    for key, label in zip(whole, labels(settings, [""] * len(whole))):
        runs = [[found[key][task][seed] for task in tasks] for seed in seeds[key]]
        tests = [100 * statistics.mean(line["test"] for line in own) for own in runs]
        trained = statistics.mean(line["trainable"] for line in runs[0])
        spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
        result.append(Point(label, key[0], trained, statistics.mean(tests), spread))
    return result


def _marks(axes: "Axes", found: list[Point]) -> None:
    """Marks with bars; those of about as many trained parameters are shifted side by side."""
    from matplotlib.transforms import ScaledTranslation

    near = (axes.get_xlim()[1] / axes.get_xlim()[0]) ** 0.03
    for point, style in zip(found, styles([point.method for point in found])):
        beside = [p for p in found if 1 / near < p.trained / point.trained < near]
        inches = 8 / 72 * (beside.index(point) - (len(beside) - 1) / 2)
        shifted = axes.transData + ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
        style |= {"linestyle": "none", "elinewidth": 1.3, "transform": shifted}
        axes.errorbar(point.trained, point.mean, point.deviation, **style)
    low = min(point.mean - point.deviation for point in found)
    high = max(point.mean + point.deviation for point in found)
    room = 0.14 * (high - low) or 1
    axes.set_ylim(low - room, high + room)


def _label(axes: "Axes", found: list[Point]) -> None:
    """Write each mark's label as near to it as it covers nothing; a far one gets a line."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    dot = axes.figure.dpi / 72  # pixels a typographic point
    marks = [container.lines[0] for container in axes.containers]
    taken = []  # by every mark with its bar, and then by the labels
    for mark, point in zip(marks, found):
        ends = [(point.trained, point.mean + d) for d in (-point.deviation, point.deviation)]
        taken.append(Bbox(mark.get_transform().transform(ends)).padded(4 * dot))
    for mark, point in zip(marks, found):
        middle = mark.get_transform().transform((point.trained, point.mean))
        looks = {"color": [0.65 * part for part in mark.get_color()]}
        line = looks | {"arrowstyle": "-", "linewidth": 0.6, "shrinkB": 4}
        looks |= {"ha": "center", "va": "center", "fontsize": 9, "arrowprops": line}
        text = axes.annotate(
            point.label, middle, (0, 0), "figure pixels", textcoords="offset points", **looks
        )
        size = Text.get_window_extent(text).size  # the text's alone, without its line
        others = [box for box in taken if not box.contains(*middle)]
        best = math.inf
        for far, turn in itertools.product(range(6, 96, 6), range(0, 360, 30)):
            way = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            shift = [w * (far * dot + half) for w, half in zip(way, size / 2)]
            box = Bbox.from_bounds(*(middle + shift - size / 2), *size)
            path = [middle + [w * part / 4 for w in shift] for part in range(1, 4)]
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            cost = far + 1000 * (not inside) + 1000 * box.count_overlaps(taken)
            cost += 40 * sum(any(other.contains(*spot) for spot in path) for other in others)
            if cost < best:
                best, place, line = cost, box, far > 14
                text.set_position([s / dot for s in shift])
        text.arrow_patch.set_visible(line)
        taken.append(place)


def forest(lines: list[dict]) -> "Figure | None":
    """Each method's test accuracy less SAN's, as `paired.differences` has it, and 95 % intervals.

    lines: those of results.jsonl. A panel per model, the best method on top; below each mean over
    tasks lie small dots, the single tasks. None where no line tells which pictures were right.
    """
    panels: dict[str, list[tuple[str, paired.Paired]]] = {}
    for (model, method, _), pair in paired.differences(lines).items():
        panels.setdefault(model, []).append((method, pair))
    if not panels:
        return None
    most, columns = max(map(len, panels.values())), min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(9.5 if columns > 1 else 6.5, rows * (0.42 * most + 0.9))
    for i, (model, found) in enumerate(panels.items()):
        found.sort(key=lambda one: -one[1].difference.value)
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.axvline(0, color="black", linewidth=0.9)
        for row, (style, (_, pair)) in enumerate(zip(styles([m for m, _ in found]), found)):
            value, low, high = (100 * number for number in pair.difference)
            bar = [[value - low], [high - value]]
            axes.errorbar(value, row, xerr=bar, **style | {"linestyle": "none", "elinewidth": 1.5})
            if len(pair.tasks) > 1:
                single = [100 * own.value for own in pair.tasks.values()]
                axes.scatter(single, [row + 0.3] * len(single), s=7, color=style["color"])
        axes.set_yticks(range(len(found)), [pair.label for _, pair in found])
        axes.set_ylim(len(found) - 0.4, -0.5)
        _name(axes, model, "test accuracy less SAN's, points", "")
        axes.tick_params(axis="y", labelsize=9, length=0)
    return figure


def gamma(runs: list[Run]) -> "Figure | None":
    """Every layer's γ, as a histogram and as a row of an image: its channels, sorted.

    Each channel takes the same share of the row, so that its black tick, between depression (γ < 1)
    and potentiation (γ > 1), tells the share of depressed channels. All runs have the same axes;
    those with the same layers stand side by side, two in a row.
    """
    runs = [run for run in runs if run.gamma]
    if not runs:
        return None
    rows: list[list[tuple[Run, str]]] = []
    for run, name in zip(runs, names(runs)):
        if not (rows and len(rows[-1]) == 1 and [*rows[-1][0][0].gamma] == [*run.gamma]):
            rows.append([])
        rows[-1].append((run, name))
    heights = [ROW * len(row[0][0].gamma) + 0.9 for row in rows]
    figure = _figure(9.5, sum(heights) + 0.4)
    away = torch.cat([values - 1 for run in runs for values in run.gamma.values()]).abs()
    widest = max(away.max().item(), 1e-6)
    strong = max(away.quantile(0.99).item(), 1e-6)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, row in zip(parts, rows):
        grid = part.subplots(1, 2 * len(row), sharey=True, squeeze=False)[0]
        for (run, name), left, right in zip(row, grid, grid[len(row) :]):
            _histograms(left, run.gamma, widest)
            image = _channels(right, run.gamma, strong)
            title = textwrap.fill(name, 48 // len(row))
            _name(left, title, "γ", "")
            left.grid(False, axis="y")
            _name(right, title, "channels by γ, %", "")
        bar = part.colorbar(image, ax=list(grid), extend="both", aspect=40, pad=0.01)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("γ", fontsize=9)
    figure.suptitle(f"{shared(runs)}: depression (γ < 1) and potentiation (γ > 1)", fontsize=11)
    return figure


def _histograms(axes: "Axes", gamma: dict[str, Tensor], widest: float) -> None:
    """One a layer over 1 ± widest, each as high as its row, with an edge at 1."""
    edges = torch.linspace(1 - widest, 1 + widest, BINS + 1).tolist()
    for i, values in enumerate(gamma.values()):
        counts = values.histc(BINS, edges[0], edges[-1])
        tops = (i + 0.47 - 0.92 * counts / counts.max()).tolist()
        for side, colour in ((slice(BINS // 2), "#4a90c2"), (slice(BINS // 2, BINS), "#d0604f")):
            ends = edges[side.start or 0 : side.stop + 1]
            axes.stairs(tops[side], ends, baseline=i + 0.47, fill=True, color=colour)
    axes.axvline(1, color="black", linewidth=0.7)
    axes.set_yticks(range(len(gamma)), gamma)
    axes.set_ylim(len(gamma) - 0.5, -0.5)  # the first layer on top
    axes.set_xlim(edges[0], edges[-1])


def _channels(axes: "Axes", gamma: dict[str, Tensor], strong: float):
    """The image, in full colour from 1 ± strong on."""
    stretch = torch.arange(COLUMNS)
    rows = [values.sort().values[stretch * len(values) // COLUMNS] for values in gamma.values()]
    low = [100 * (values < 1).float().mean().item() for values in gamma.values()]
    places = torch.arange(len(rows))
    axes.vlines(low, places - 0.5, places + 0.5, color="black", linewidth=1.2)
    axes.hlines(places - 0.5, 0, 100, color="white", linewidth=0.8)
    return axes.imshow(
        torch.stack(rows).numpy(),
        cmap="RdBu_r",
        vmin=1 - strong,
        vmax=1 + strong,
        aspect="auto",
        interpolation="nearest",
        extent=(0, 100, len(rows) - 0.5, -0.5),
    )


def change(runs: list[Run], base_of: Callable[[dict], dict[str, Tensor]]) -> "Figure | None":
    """‖W* − W‖ / ‖W‖ by layer, a panel per model; a run that changes no matrix is left out."""
    found = [(run, weight_change(run, base_of)) for run in runs]
    found = [(run, own) for run, own in found if any(own.values())]
    if not found:
        return None
    layers: dict[str, dict[str, None]] = {}  # of a model, in the links' order where it is known
    for run, own in sorted(found, key=lambda pair: not pair[0].links):
        layers.setdefault(run.result["model"], {}).update(dict.fromkeys(own))
    figure = _figure(max(7.5, 4.7 * len(layers)), ROW * max(map(len, layers.values())) + 1.6)
    grid = dict(zip(layers, figure.subplots(1, len(layers), sharex=True, squeeze=False)[0]))
    runs = [run for run, _ in found]
    lines, looks = [], styles([run.result["method"] for run in runs])
    for (run, own), name, style in zip(found, names(runs), looks):
        model = run.result["model"]
        ratios = [100 * own.get(layer, 0) or math.nan for layer in layers[model]]  # 0 has no log
        lines += grid[model].plot(ratios, range(len(ratios)), label=name, **style)
    for model, axes in grid.items():
        every = [100 * ratio for _, own in found for ratio in own.values() if ratio]
        _log(axes, every, "{x:g}", room=0.05)
        axes.set_yticks(range(len(layers[model])), layers[model])
        axes.set_ylim(len(layers[model]) - 0.4, -0.6)
        _name(axes, model if len(grid) > 1 else "", "change ‖W* − W‖ / ‖W‖, %", "")
    _legend(figure, lines, runs)
    return figure


def weight_change(run: Run, base_of: Callable[[dict], dict[str, Tensor]]) -> dict[str, float]:
    """Layer → ‖W* − W‖ / ‖W‖ (Frobenius), of the linked layers or else every matrix but the head.

    Empty if the merged model was not kept. Raises OSError if it is broken.
    """
    path = run.path / ("model.pt" if run.result["method"] == "full" else "merged.pt")
    if not path.exists():
        return {}
    merged = saved.model(path, ["state_dict"])["state_dict"]
    ratios = {}
    for key, before in base_of(run.config).items():
        layer, after = key.removesuffix(".weight"), merged.get(key)
        if layer in (key, "head") or after is None or after.shape != before.shape:
            continue
        if before.ndim >= 2 and before.any():
            before = before.cpu().float()
            ratios[layer] = ((after.float() - before).norm() / before.norm()).item()
    return {layer: ratios[layer] for layer in run.links or ratios if layer in ratios}


# -------------------------------------------------------------------------------- what they share


def shared(runs: list[Run]) -> str:
    """The data set and the model, where all runs have the same."""
    both = [{run.result[key] for run in runs} for key in ("dataset", "model")]
    return ", ".join(own.pop() for own in both if len(own) == 1)


def _figure(width: float, height: float) -> "Figure":
    """An empty one, in inches. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib; pip install -r requirements-extra.txt"
        ) from error
    return Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")


def _name(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.images:
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)


def _log(axes: "Axes", values: list[float], form: str, room: float) -> None:
    """A log axis around the values, a share of its length as room; at 2 and 5 too if short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(values), max(values)
    pad = max((high / low) ** room, math.sqrt(6 * low / high))  # a factor of 6 at least
    axes.set_xscale("log")
    axes.set_xlim(low / pad, high * pad)
    short = high * pad**2 < 60 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", lines: list, runs: list[Run]) -> None:
    """What all runs have in common above, and what each is below, in as many columns as fit."""
    longest = max(len(line.get_label()) for line in lines)
    columns = max(1, int(figure.get_figwidth() * 14) // (longest + 9))
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=4,
    )
    figure.suptitle(shared(runs), fontsize=11)
