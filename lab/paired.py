"""Methods beside SAN, test example by test example, with 95 % intervals; [us] our choice."""

import base64
import json
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 2000  # of the bootstrap
SAN = ("san", "both, shift (SAN)")  # in a comparison, in an ablation
Key = tuple[str, str, str]  # model, method, options as JSON: what makes a row of a table


def runs_of(lines: list[dict], part: str, by: str) -> dict[Key, dict[str, dict]]:
    """Row of a table → task → a part's lines by their seed or lr; of two such the last."""
    runs: dict[Key, dict[str, dict]] = {}
    for line in lines:
        if line["part"] == part:
            key = line["model"], line["method"], json.dumps(line["options"], sort_keys=True)
            runs.setdefault(key, {}).setdefault(line["task"], {})[line[by]] = line
    return runs


def labels_of(runs: Iterable[Key]) -> dict[Key, str]:
    """Each row's method, with the options in which rows differ."""
    options = {key: json.loads(key[2]) for key in runs}
    first = next(iter(options.values()), {})
    differ = [k for k in first if any(own.get(k) != first[k] for own in options.values())]
    return {
        key: ", ".join([key[1], *(f"{k} {own.get(k)}" for k in differ)])
        for key, own in options.items()
    }


def pack(worth: Tensor) -> str:
    """N answers' worth, 0 … 1, as text: their number, a colon and bytes in base64.

    Right or wrong takes a bit, eight to a byte, the first lowest. Where an answer may be worth a
    part of 1, 255 · worth takes a byte, which thirds and fifths fit; "/255" follows the number.
    """
    if ((worth == 0) | (worth == 1)).all():
        bits = F.pad(worth.long(), (0, -len(worth) % 8)).view(-1, 8) << torch.arange(8)
        kind, octets = "", bits.sum(1)
    else:
        kind, octets = "/255", (255 * worth).round().long()
    return f"{len(worth)}{kind}:{base64.b64encode(bytes(octets.tolist())).decode()}"


def unpack(text: str) -> Tensor:
    """The N values that `pack` made a text of, bool or float. Raises ValueError for another."""
    try:
        number, code = text.split(":")
        count, in_bytes = int(number.removesuffix("/255")), number.endswith("/255")
        octets = torch.tensor([*base64.b64decode(code, validate=True)], dtype=torch.long)
        if len(octets) != (count if in_bytes else -(-count // 8)):
            raise ValueError(f"{len(octets)} bytes are not those of {count} answers")
    except ValueError as error:
        raise ValueError(f"what a line holds as 'right' is broken: {error}") from error
    if in_bytes:
        return octets.double() / 255
    return (octets[:, None] >> torch.arange(8) & 1).flatten()[:count].bool()


class Interval(NamedTuple):
    """A difference of accuracies, −1 … 1, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In points: '−0.8 [−1.3, −0.2]'."""
        value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in self)
        return f"{value} [{low}, {high}]"

    @property
    def verdict(self) -> str:
        """What the interval alone says: it lies above 0, below, or holds it."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "level"

    @property
    def to_decide(self) -> str:
        """About how many times the data would decide what is level: (h / |value|)².

        h is how far the interval reaches from its value towards 0; it shrinks as 1/√data.
        """
        if self.verdict != "level":
            return "—"
        if not self.value:
            return "× ∞"
        h = self.value - self.low if self.value > 0 else self.high - self.value
        times = (h / self.value) ** 2
        return f"× {times:.1f}" if times < 10 else f"× {times:,.0f}"


class Paired(NamedTuple):
    """A method beside SAN, with the same seeds on the same examples."""

    label: str  # the method, with the options that set it apart
    difference: Interval  # to SAN, the mean over tasks
    tasks: dict[str, Interval]


def differences(lines: list[dict]) -> dict[Key, Paired]:
    """Every other method's accuracy minus SAN's, answer by answer, with intervals.

    SAN is the row of that name with the same model and options; in an ablation, its whole SAN.
    A task's difference is the mean over seeds and answers of (worth − worth of SAN's answer), seed
    k with seed k, which trained on the same examples in the same order; then comes the mean over
    the tasks that both were scored on, by the seeds that all of these have.
    The interval is a bootstrap's, percentiles 2.5 and 97.5 of DRAWS: each draws test examples with
    replacement within every task, the same for all seeds, and seeds, the same for all tasks. [us]
    It covers other test examples and other seeds. It does not cover other tasks, other backbones,
    another choice of the learning rate, or that many methods are looked at together; and of two or
    three seeds a bootstrap learns little about others. Where seeds answer independently of each
    other, the interval is up to √3 times as wide as it need be: chance counts for examples too.
    Lines without `right` do not count. Raises ValueError if two runs were not scored on the same
    examples.
    """
    labels = labels_of(runs_of(lines, "test", "seed"))
    runs = runs_of([line for line in lines if "right" in line], "test", "seed")
    found = {}
    for key, own in runs.items():
        other = next((runs[k] for name in SAN if (k := (key[0], name, key[2])) in runs), {})
        tasks = [task for task in own if task in other]
        seeds = [set(run[task]) for task in tasks for run in (own, other)]
        seeds = sorted(set.intersection(*seeds)) if seeds else []
        if key[1] in SAN or not seeds:
            continue
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(seeds), (DRAWS, len(seeds)), generator=generator)
        weights = F.one_hot(picks, len(seeds)).double().mean(1)  # DRAWS×seeds
        means, drawn = [], []
        for task in tasks:
            worth = [unpack(run[task][seed]["right"]) for run in (own, other) for seed in seeds]
            if len({len(row) for row in worth}) > 1:
                raise ValueError(f"the runs on {task} were not scored on the same test examples")
            mine, its = torch.stack(worth).double().chunk(2)
            means.append((mine - its).mean())
            drawn.append((weights * resampled(mine - its, generator)).sum(1))
        means, drawn = torch.stack(means), torch.stack(drawn)
        by_task = dict(zip(tasks, map(interval, means, drawn)))
        found[key] = Paired(labels[key], interval(means.mean(), drawn.mean(0)), by_task)
    return found


def resampled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each seed's mean over examples drawn with replacement, DRAWS×seeds; values: seeds×examples.

    How often each example is drawn is multinomial. Examples with equal values are interchangeable,
    so that the counts of these few kinds are drawn instead, one binomial after another.
    """
    kinds, sizes = values.unique(dim=1, return_counts=True)
    rest = values.shape[1]
    to_draw = torch.full((DRAWS,), float(rest), dtype=torch.float64)
    total = torch.zeros(DRAWS, len(values), dtype=torch.float64)
    for kind, size in zip(kinds.T, sizes.tolist()):
        count = torch.binomial(to_draw, torch.full_like(to_draw, size / rest), generator=generator)
        total += count[:, None] * kind
        to_draw, rest = to_draw - count, rest - size
    return total / values.shape[1]


def interval(value: Tensor, drawn: Tensor) -> Interval:
    """A value with percentiles 2.5 and 97.5 of what was drawn."""
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value.item(), *ends.tolist())
