"""The files that runs leave behind: what each must hold, and the one reader of each.

What is missing in a file, or of another kind than belongs there, is one OSError that names file and
entry. Tensors are read by `san.read`, adapters of SAN and SSF by `san.read_adapter`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import san
from lab import paired

# -------------------------------------------------------------------------------- kinds of values


def number(low: float, high: float = 1e300, whole: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a number from low to high; true and false are none."""
    types = (int,) if whole else (int, float)
    return lambda value: type(value) in types and low <= value <= high


def each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list, not empty, of such as fit."""
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(fits, value))


def is_hits(value: Any) -> bool:
    """Whether it is what `paired.pack` makes."""
    try:
        return paired.unpack(value) is not None
    except (ValueError, AttributeError):
        return False


def is_state(value: Any) -> bool:
    """Whether it is finite tensors of floats by their names, as a model's state dict."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and san.is_dense(v) and v.is_floating_point() and v.isfinite().all()
        for name, v in value.items()
    )


TEXT, FLAG, ENTRIES, STATE = "a text", "true or false", "entries by name", "finite weights by name"
NUMBER, AMOUNT, POSITIVE = "a number", "a number, 0 or more", "a number above 0"
COUNT, FROM_0, SHARE = "a whole number above 0", "a whole number, 0 or more", "a share, 0 … 1"
TEXTS, COUNTS, HITS = "texts in a list", "whole numbers above 0 in a list", "a text of `pack`"
PART, COUNTED = "search or test", "whole numbers above 0 by name"
KINDS = {
    TEXT: lambda v: isinstance(v, str),
    FLAG: lambda v: isinstance(v, bool),
    NUMBER: lambda v: type(v) is float or number(-(2**53), 2**53, whole=True)(v),  # nan as well
    AMOUNT: number(0),
    POSITIVE: number(5e-324),
    COUNT: number(1, 2**53, whole=True),
    FROM_0: number(0, 2**53, whole=True),
    SHARE: number(0, 1 + 1e-6),  # a mean of float32 may round up
    ENTRIES: lambda v: isinstance(v, dict) and all(isinstance(name, str) for name in v),
    STATE: is_state,
    HITS: is_hits,
    PART: lambda v: v in ("search", "test"),
}
KINDS |= {TEXTS: each(KINDS[TEXT]), COUNTS: each(KINDS[COUNT])}
KINDS |= {"three numbers": lambda v: each(number(-1e9, 1e9))(v) and len(v) == 3}
KINDS |= {"three numbers above 0": lambda v: each(number(1e-9, 1e9))(v) and len(v) == 3}
KINDS |= {"a text or texts in a list": lambda v: KINDS[TEXT](v) or KINDS[TEXTS](v)}
KINDS |= {"texts of `pack` by name": lambda v: KINDS[ENTRIES](v) and all(map(is_hits, v.values()))}
KINDS |= {COUNTED: lambda v: KINDS[ENTRIES](v) and all(map(KINDS[COUNT], v.values()))}
KINDS |= {"shares by name": lambda v: KINDS[ENTRIES](v) and all(map(KINDS[SHARE], v.values()))}

# ------------------------------------------------------------------------------ what files hold

# config.json, and a checkpoint's settings: the flags of both scripts
CONFIG = {
    **dict.fromkeys(("dataset", "task", "data", "dtype"), TEXT),
    **dict.fromkeys(("method", "mode", "wiring", "device", "out"), TEXT),
    **dict.fromkeys(("protocol", "weights", "evaluate", "data_dir"), f"{TEXT} or null"),
    **dict.fromkeys(("train_file", "score", "ask"), f"{TEXT} or null"),
    **dict.fromkeys(("model", "tasks"), TEXTS),
    **dict.fromkeys(("methods", "table", "plot", "log"), f"{TEXTS} or null"),
    **dict.fromkeys(("shift", "norms", "pretrain", "ablation", "compile"), FLAG),
    **dict.fromkeys(("amp", "recompute", "resume", "compare", "tower", "blind", "shard"), FLAG),
    **dict.fromkeys(("prompts", "rank", "epochs", "batch_size", "accumulate"), COUNT),
    **dict.fromkeys(("shots", "test_shots", "image_size"), f"{COUNT} or null"),
    **dict.fromkeys(("workers", "seed", "seeds"), FROM_0),
    **dict.fromkeys(("gamma_std", "weight_decay", "warmup_epochs"), AMOUNT),
    "lr": POSITIVE,
    **dict.fromkeys(("alpha", "projector_lr"), f"{POSITIVE} or null"),
}
# metrics.jsonl: a line for each epoch, then the result. A checkpoint has such epochs too
EPOCH = {"epoch": COUNT, "loss": NUMBER, "val": f"{SHARE} or null"}
RESULT = {"dataset": TEXT, "model": TEXT, "method": TEXT, "test": SHARE}
# results.jsonl: every line; what a scored run's has besides; what any may have
LINE = {"task": TEXT, "model": TEXT, "method": TEXT, "part": PART, "lr": POSITIVE}
LINE |= {"seed": FROM_0, "val": f"{SHARE} or null", "options": ENTRIES}
SCORED = {"test": SHARE, "trainable": COUNT, "percent": AMOUNT, "seconds": AMOUNT}
SCORED |= {"memory": NUMBER, "merge_same": SHARE, "merge_difference": NUMBER}
MAYBE = {"wall": AMOUNT, "group": f"{TEXT} or null", "right": HITS, "parts": "shares by name"}
MAYBE |= {
    "test_norm": SHARE,
    "parts_norm": "shares by name",
    "parts_right": "texts of `pack` by name",
}
# merged.pt and model.pt, of train_vision or of train_lm, and the latter's LLaMA, or LLaVA
MODEL = {"state_dict": STATE}
MODEL |= {"model": TEXT, "factors": COUNTS, "image_size": COUNT}
MODEL |= {"numbers": ENTRIES, "tokenizer": "a text or texts in a list"}
NUMBERS = {**dict.fromkeys(("vocab", "dim", "depth", "heads", "kv_heads"), COUNT), "tied": FLAG}
NUMBERS |= {"hidden": COUNT, "context": COUNT, "head_dim": f"{COUNT} or null"}
NUMBERS |= {"eps": POSITIVE, "rope_base": POSITIVE, "rope_scaling": f"{ENTRIES} or null"}
SEEING = {"tower": COUNTED, "picture": FROM_0, "pool": COUNT}
# checkpoint.pt; a mean of parameters too, where there is one
CHECKPOINT = {"settings": ENTRIES, "model": STATE, "optimizer": ENTRIES}


def require(content: Any, wanted: dict[str, str], optional: Iterable = ()) -> dict:
    """The content itself. Raises ValueError unless every entry wanted is there, of its kind.

    optional: kinds of entries that it may lack.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds {described(content)}, not {ENTRIES}")
    for name, kind in (wanted | dict(optional)).items():
        if name not in content and name in wanted:
            raise ValueError(f"it has no '{name}'")
        value, own = content.get(name), kind.removesuffix(" or null")
        if name in content and not (KINDS[own](value) or (value is None and own != kind)):
            raise ValueError(f"'{name}' is {described(value)}, not {kind}")
    return content


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {'×'.join(map(str, value.shape)) or 'one number'}"
    if isinstance(value, (dict, list, tuple)) and value:
        return f"a {type(value).__name__} of {len(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) < 40 else f"{text[:38]} …"


def difference(there: Any, here: Any, name: str = "") -> str:
    """Where tensors by name, in dicts of any depth, are not alike in names, shapes and types.

    The first such name, '' if there is none.
    """
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [*here, *there]:
            inner = f"{name} {key}".strip()
            if key not in here or key not in there:
                return inner
            if found := difference(there[key], here[key], inner):
                return found
        return ""
    alike = san.is_dense(there) and san.is_dense(here)
    return "" if alike and (there.shape, there.dtype) == (here.shape, here.dtype) else name or "it"


# ---------------------------------------------------------------------------------------- readers


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ValueError about what a file holds becomes an OSError that names it."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{path} is broken: {error}") from error


def json_of(text: str) -> Any:
    """What a JSON text says. Raises ValueError, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


def config(folder: Path) -> dict:
    """The flags in a run's config.json. Raises OSError."""
    path = folder / "config.json"
    with naming(path):
        return require(json_of(path.read_text()), {}, CONFIG)


def metrics(folder: Path) -> tuple[list[dict], dict]:
    """The epochs and the result in a run's metrics.jsonl. Raises OSError."""
    path = folder / "metrics.jsonl"
    with naming(path):
        lines = [json_of(line) for line in path.read_text().splitlines()]
        if not lines:
            raise ValueError("it holds no line")
        return [require(line, EPOCH) for line in lines[:-1]], require(lines[-1], RESULT)


def results(path: Path) -> list[dict]:
    """The lines of a comparison's results.jsonl. Raises OSError."""
    with naming(path):
        lines = [json_of(line) for line in path.read_text().splitlines()]
        for line in lines:
            require(line, LINE, MAYBE)
            if line["part"] == "test":
                require(line, SCORED)
            tasks = line["options"].get("tasks", [line["task"]])
            parts = [line[key] for key in ("parts", "parts_norm") if key in line]
            if not (KINDS[TEXTS](tasks) and all(t in own for own in parts for t in tasks)):
                raise ValueError(f"its parts are not those of its tasks, {described(tasks)}")
        return lines


def model(path: Path, wanted: Iterable[str]) -> dict:
    """What merged.pt or model.pt holds: the entries wanted, of MODEL. Raises OSError."""
    content = san.read(path)
    with naming(path):
        return require(content, {name: MODEL[name] for name in wanted})


def links_and_gammas(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """The linked layers in an adapter.pt in their order, and layer → γ. Raises OSError."""
    content = san.read(path)
    with naming(path):
        if isinstance(content, dict) and "trained" in content:  # of a method that is not san's own
            links, values = [], require(content, {"trained": STATE})["trained"]
        else:
            content = san.read_adapter(path)
            links, values = [str(link[0]) for link in content["links"]], content["values"]
    gammas = {k.removesuffix(".gamma"): v for k, v in values.items() if k.endswith(".gamma")}
    for layer, gamma in gammas.items():
        if gamma.ndim != 1 or not len(gamma):
            raise OSError(f"{path} is broken: γ of {layer} is {described(gamma)}, not a vector")
    return links, {name: gammas[name].float() for name in [*links, *gammas] if name in gammas}


def checkpoint(path: Path) -> dict:
    """A checkpoint's content; whether its tensors fit the run tells `require_alike`.

    Raises OSError.
    """
    content = san.read(path)
    with naming(path):
        require(content, CHECKPOINT)
        require(content["settings"], {}, CONFIG)
        history = content.get("history")
        if not isinstance(history, list) or not history:
            raise ValueError(f"'history' is {described(history)}, not epochs in a list")
        for record in history:
            require(record, EPOCH | {"seconds": AMOUNT})
        return content


def require_alike(path: Path, there: dict, here: dict) -> None:
    """Raise OSError if a checkpoint's tensors have other names, shapes or types than the run's."""
    if found := difference(there, here):
        raise OSError(
            f"{path} is broken: '{found}' is not what this run would hold there; remove it and "
            "start again"
        )
