"""SAN (Synapse and Neuron) fine-tuning in one file that needs torch alone: copy it and use it.

A frozen layer l computes z = W_l x + b_l. SAN trains one vector γ_l for it, and uses it twice:

1. feature scaling (the neuron):    y = γ_l ⊙ z, optionally + β_l;
2. propagation (the synapse):       W'_{l+1} = W_{l+1} diag(γ_l) in the posterior layer l+1;
3. merge, after training, exactly:  W* = diag(γ_l) W_l diag(γ_{l-1}),  b* = γ_l ⊙ b_l + β_l.

    links = [Link("fc1"), Link("fc2", anterior="fc1")]
    attach(model, links, trainable=["norm", "head"])
    ...                                    # train the parameters that require a gradient
    save_adapter(model, "adapter.pt")      # kilobytes
    merge(model)                           # plain layers again

Sources: [P] Dai et al., "SAN", ICML 2025, arXiv 2409.06706; [C] its authors' v1 code;
[S] SSF, Lian et al., NeurIPS 2022, arXiv 2210.08823; [us] our choice. The three formulas are
[P, C]; β is SSF's [S]; the links and everything about files and errors are ours.
"""

import difflib
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODES = ("both", "feature", "propagation")


class Link(NamedTuple):
    """One adapted layer, the anterior layer whose γ it reads, and how.

    layer, anterior: module names as in `model.named_modules()`; anterior None: nothing to read.
    index: for each input channel of `layer`, the output channel of `anterior` it carries;
    None: channel c carries channel c. It covers a slice of a fused layer (a range) or a repeat.
    """

    layer: str
    anterior: str | None = None
    index: Sequence[int] | None = None


# ------------------------------------------------------------------------------------ the layer


class SANLayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d between its two diagonals:

        y = γ ⊙ ( (W diag(γ')) x + b ) + β

    x: …×in for Linear, …×in×H×W for Conv2d; γ, β: out; γ': the anterior layer's own γ, brought
    to this layer's `in` channels by the index. γ is ones and β zeros at the start.

    Without `features`, γ does not act here, only in the posterior layers that read it; gamma is
    None where nothing would read it either.
    """

    def __init__(self, layer: nn.Module, gamma: bool, beta: bool, features: bool):
        super().__init__()
        weight = layer.weight
        # trained in float32 at least: steps near 1 are lost to half precision's rounding
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ones = torch.ones(len(weight), dtype=dtype, device=weight.device)
        self.layer = layer
        self.gamma = nn.Parameter(ones) if gamma else None
        self.beta = nn.Parameter(torch.zeros_like(ones)) if beta else None
        self.features = features  # whether γ scales this layer's own output
        self.enabled = True
        # In a tuple, so that torch does not register the anterior layer as a part of this one:
        # its γ is shared, and stays one parameter under one name.
        self._anterior: tuple[SANLayer, ...] = ()
        self.register_buffer("index", None, persistent=False)

    def read(self, anterior: "SANLayer", index: Tensor | None) -> None:
        """Make `anterior`'s γ the one that is propagated to this layer's weight."""
        self._anterior = (anterior,)
        self.index = index

    def anterior_gamma(self) -> Tensor | None:
        """γ', one entry per input channel, or None without an anterior layer."""
        if not self._anterior:
            return None
        gamma = self._anterior[0].gamma
        return gamma if self.index is None else gamma[self.index]

    def forward(self, x: Tensor) -> Tensor:
        """The cheap form: (W diag(γ')) x = W (γ' ⊙ x), so autograd never builds W's gradient."""
        if not self.enabled:
            return self.layer(x)
        x = self._scale(x, self.anterior_gamma())  # 2. propagation, moved from the weight to x
        z = self.layer(x)
        return self._scale(z, self.gamma if self.features else None, self.beta)  # 1. the features

    def forward_explicit(self, x: Tensor) -> Tensor:
        """The same, as the paper writes it: γ' is seen acting on the posterior weight's columns."""
        weight = self.layer.weight * self._columns(self.anterior_gamma())
        weight = weight.to(self.layer.weight.dtype)
        if isinstance(self.layer, nn.Linear):
            z = nn.functional.linear(x, weight, self.layer.bias)
        else:
            z = self.layer._conv_forward(x, weight, self.layer.bias)
        return self._scale(z, self.gamma if self.features else None, self.beta)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself, now with W* = diag(γ) W diag(γ') and b* = γ ⊙ b + β.

        Folded in float32 (float64 if the weight has it) and rounded to the weight's type once.
        """
        layer, wide = self.layer, torch.promote_types(self.layer.weight.dtype, torch.float32)
        rows = torch.ones(len(layer.weight), dtype=wide, device=layer.weight.device)
        if self.features and self.gamma is not None:
            rows = self.gamma.to(wide)
        weight = layer.weight.to(wide) * self._columns(self.anterior_gamma())
        weight = weight * rows.view(-1, *[1] * (weight.ndim - 1))
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        if layer.bias is not None:
            bias = layer.bias.to(wide) * rows + (0 if self.beta is None else self.beta)
            layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
        return layer

    def _scale(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None = None) -> Tensor:
        """γ ⊙ x + β along the channels, computed in γ's precision, returned in x's."""
        if gamma is None and beta is None:
            return x
        if isinstance(self.layer, nn.Conv2d):  # channels stand before height and width
            gamma, beta = (None if v is None else v.view(-1, 1, 1) for v in (gamma, beta))
        if beta is None:
            return (x * gamma).to(x.dtype)
        return (x + beta if gamma is None else torch.addcmul(beta, x, gamma)).to(x.dtype)

    def _columns(self, gamma: Tensor | None) -> Tensor | float:
        """γ' in a shape that scales the input columns of the weight.

        A convolution in g groups has a weight out×in/g×kh×kw: output channels of group i read
        input channels i·in/g … (i+1)·in/g − 1, so each group's rows get their own stretch of γ'.
        """
        if gamma is None:
            return 1.0
        if isinstance(self.layer, nn.Linear):
            return gamma  # 1×in by broadcasting
        groups = self.layer.groups
        rows = gamma.view(groups, 1, -1).expand(-1, self.layer.out_channels // groups, -1)
        return rows.flatten(0, 1)[:, :, None, None]  # out × in/g × 1 × 1


# ---------------------------------------------------------------------------- attach and detach


@dataclass
class _Attached:
    """What a model with SAN layers remembers of its base."""

    links: list[Link]
    mode: str
    shift: bool
    trainable: list[str]
    first_values: dict[str, Tensor]  # of what `trainable` names
    required_grad: dict[str, bool]
    base_shapes: dict[str, list[int]]  # by state-dict key


def attach(
    model: nn.Module,
    links: Iterable[Link],
    *,
    mode: str = "both",
    shift: bool = False,
    trainable: Iterable[str] = (),
) -> None:
    """Freeze `model` and put a SAN layer in place of each linked layer; the output stays the same.

    mode: "both" (SAN), "feature" (scaling alone), "propagation" (alone): the ablation of [C].
    shift: train β as well; mode="feature" with shift=True is SSF [S]. A layer without a bias gets
    no β, since nothing in the base model could hold it after the merge [us].
    trainable: names of modules or parameters to train besides, such as norms and the head [C].

    Raises ValueError or TypeError, and leaves the model as it was, for a model that has SAN layers,
    an unknown name, a layer linked twice, an anterior that is not linked, an index that does not
    fit, a layer other than nn.Linear and nn.Conv2d, or a weight tied to another layer's.
    """
    if hasattr(model, "_san"):
        raise ValueError("this model has SAN layers already; merge or detach it first")
    if mode not in MODES:
        raise ValueError(f"mode '{mode}' is unknown; choose one of {', '.join(MODES)}")
    links = [Link(*link) for link in links]
    trainable = [trainable] if isinstance(trainable, str) else list(trainable)
    modules = dict(model.named_modules(remove_duplicate=False))
    indices = _check(model, links, modules)
    state = model.state_dict()
    first_values = {}
    for name in trainable:
        keys = [key for key in state if key == name or key.startswith(f"{name}.")]
        if not keys:
            raise ValueError(
                f"nothing to train is called '{name}'{_closest(name, [*modules, *state])}"
            )
        inside = [k for k in keys for link in links if k.startswith(f"{link.layer}.")]
        if inside:
            raise ValueError(f"'{inside[0]}' belongs to a linked layer, which stays frozen")
        first_values.update({key: state[key].clone() for key in keys})

    model._san = _Attached(
        links=links,
        mode=mode,
        shift=shift,
        trainable=trainable,
        first_values=first_values,
        required_grad={name: p.requires_grad for name, p in model.named_parameters()},
        base_shapes={key: list(value.shape) for key, value in state.items()},
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in first_values:
            parameter.requires_grad_(True)
    anteriors = {link.anterior for link in links}
    layers = {}
    for link in links:
        layer = modules[link.layer]
        layers[link.layer] = SANLayer(
            layer,
            gamma=mode != "propagation" or link.layer in anteriors,
            beta=shift and layer.bias is not None,
            features=mode != "propagation",
        )
        layers[link.layer].train(layer.training)
        _replace(model, link.layer, layers[link.layer])
    for link, index in zip(links, indices):
        if link.anterior is not None and mode != "feature":
            layers[link.layer].read(layers[link.anterior], index)


def _check(model: nn.Module, links: list[Link], modules: dict) -> list[Tensor | None]:
    """Raise for the first link that cannot be made; give the indices as tensors."""
    if not links:
        raise ValueError("there is no link; name at least one layer to adapt")
    names = [link.layer for link in links]
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name in names:
        if not name or name not in modules:
            raise ValueError(f"the model has no layer '{name}'{_closest(name, [*modules])}")
        if names.count(name) > 1:
            raise ValueError(f"layer '{name}' is linked twice; give each layer one link")
        # exact classes: a subclass may compute something else, or never call forward at all
        if type(modules[name]) not in (nn.Linear, nn.Conv2d):
            kind = type(modules[name]).__name__
            raise TypeError(f"layer '{name}' is a {kind}; SAN adapts nn.Linear and nn.Conv2d alone")
        for parameter in modules[name].parameters():
            if len(users[id(parameter)]) > 1:
                tied = " and ".join(f"'{user}'" for user in users[id(parameter)])
                raise ValueError(f"{tied} are one tied weight, which SAN would scale for both")
    indices = []
    for layer, anterior, index in links:
        if anterior is None:
            if index is not None:
                raise ValueError(f"layer '{layer}' has an index but no anterior layer to read")
            indices.append(None)
            continue
        if anterior not in names:
            raise ValueError(
                f"the anterior '{anterior}' of layer '{layer}' is not adapted; link it as well"
                f"{_closest(anterior, names)}"
            )
        weight = modules[layer].weight
        inputs = weight.shape[1] * getattr(modules[layer], "groups", 1)
        outputs = len(modules[anterior].weight)
        length = outputs if index is None else len(index)
        if length != inputs:
            what = f"'{anterior}' has" if index is None else "the index has"
            raise ValueError(
                f"layer '{layer}' reads {inputs} channels but {what} {length}; give an index of "
                f"{inputs} channels of '{anterior}'"
            )
        if index is None:
            indices.append(None)
            continue
        index = torch.as_tensor(list(index), device=weight.device)
        if index.is_floating_point() or index.min() < 0 or index.max() >= outputs:
            raise ValueError(
                f"the index of layer '{layer}' must be whole numbers from 0 to {outputs - 1}, the "
                f"output channels of '{anterior}'"
            )
        indices.append(index.long())
    return indices


def detach(model: nn.Module) -> None:
    """Give the base model back, bit for bit: its layers, and the first values of `trainable`."""
    attached = _attached(model)
    _put_first_values(model, attached)
    for link in attached.links:
        _replace(model, link.layer, model.get_submodule(link.layer).layer)
    _forget(model, attached)


def merge(model: nn.Module) -> None:
    """Fold every γ and β into plain layers of the original classes, as `SANLayer.merged` writes.

    What `trainable` named keeps its trained values. The keys, classes and parameter count are the
    base model's again. Raises ValueError for a model without SAN layers.
    """
    attached = _attached(model)
    for link in attached.links:
        _replace(model, link.layer, model.get_submodule(link.layer).merged())
    _forget(model, attached)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes the base model's output; afterwards the adapted one's again."""
    attached = _attached(model)
    layers = [model.get_submodule(link.layer) for link in attached.links]
    if not layers[0].enabled:  # inside another `disabled`
        yield
        return
    state = model.state_dict()
    trained = {key: state[key].clone() for key in attached.first_values}
    try:
        for layer in layers:
            layer.enabled = False
        _put_first_values(model, attached)
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        for key, value in trained.items():
            model.state_dict()[key].data.copy_(value)


def _attached(model: nn.Module) -> _Attached:
    if not hasattr(model, "_san"):
        raise ValueError("this model has no SAN layers (never attached, or merged or detached)")
    return model._san


@torch.no_grad()
def _put_first_values(model: nn.Module, attached: _Attached) -> None:
    state = model.state_dict()
    for key, value in attached.first_values.items():
        if key in state and state[key].shape == value.shape:  # a head put there since is not ours
            state[key].data.copy_(value)  # .data: a backward pass may be under way


def _forget(model: nn.Module, attached: _Attached) -> None:
    del model._san
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attached.required_grad.get(name, parameter.requires_grad))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _closest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"; the closest names are {', '.join(close)}" if close else ""


# ---------------------------------------------------------------------------- files and figures


def write(content: Any, path: str | os.PathLike) -> None:
    """torch.save to a temporary file, then rename: a file is whole or absent. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def read(path: str | os.PathLike) -> Any:
    """torch.load of tensors and plain values onto the CPU; code in the file is never executed.

    Raises FileNotFoundError if it is missing, OSError if it is broken or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except pickle.UnpicklingError as error:
        raise OSError(f"{path} is refused: it is no file of tensors and plain values") from error
    except Exception as error:  # torch's unpickler raises almost anything on broken bytes
        raise OSError(f"{path} is broken or no torch file; make or fetch it again") from error


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what was trained (γ, β and what `trainable` named) with the links and settings.

    Raises ValueError for a model without SAN layers or with them disabled, OSError if it cannot
    be written.
    """
    attached = _attached(model)
    state = model.state_dict()
    layers = {link.layer: model.get_submodule(link.layer) for link in attached.links}
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the SAN layers are disabled; save the adapter outside of `disabled`")
    links = [
        (link.layer, link.anterior, None if link.index is None else torch.tensor([*link.index]))
        for link in attached.links
    ]
    content = {
        "san": 1,
        "links": links,
        "mode": attached.mode,
        "shift": attached.shift,
        "trainable": attached.trainable,
        "base_shapes": attached.base_shapes,
        "gamma": {name: x.gamma.data for name, x in layers.items() if x.gamma is not None},
        "beta": {name: x.beta.data for name, x in layers.items() if x.beta is not None},
        "trained": {key: state[key].clone() for key in attached.first_values},
    }
    write(content, path)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Attach what `save_adapter` wrote to a fresh base model, on its device and in its dtype.

    Raises ValueError, and leaves the model as it was, if the file belongs to another architecture
    or head size (naming the first keys that differ) or is no adapter; OSError if it is unreadable.
    """
    content = read(path)
    if not isinstance(content, dict) or content.get("san") != 1:
        raise ValueError(f"{path} is not an adapter that save_adapter wrote")
    if hasattr(model, "_san"):
        raise ValueError("this model has SAN layers already; load onto a fresh base model")
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    parts = ("links", "mode", "shift", "trainable", "base_shapes", "gamma", "beta", "trained")
    if missing := [part for part in parts if part not in content]:
        raise ValueError(f"{path} is a broken adapter: it has no {', '.join(missing)}")
    base = content["base_shapes"]
    differ = [key for key in [*base, *own] if base.get(key) != own.get(key)]
    if differ:
        first = [
            f"{key} ({base.get(key, 'missing')} there, {own.get(key, 'missing')} here)"
            for key in list(dict.fromkeys(differ))[:3]
        ]
        raise ValueError(f"{path} was trained on another base model: {'; '.join(first)}")
    links = [Link(*link) for link in content["links"]]
    settings = {key: content[key] for key in ("mode", "shift", "trainable")}
    attach(model, links, **settings)
    state = model.state_dict()
    try:
        for kind in ("gamma", "beta"):
            for name, value in content[kind].items():
                getattr(model.get_submodule(name), kind).data.copy_(value)
        for key, value in content["trained"].items():
            state[key].data.copy_(value)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        detach(model)
        raise ValueError(f"{path} is a broken adapter: {str(error).splitlines()[0]}") from error


def summary(model: nn.Module) -> dict[str, Any]:
    """Counts of the adapted model's parameters, and what each layer's γ has become.

    trainable, total: numbers of parameters; percent: 100 · trainable / total;
    layers: name → share of channels potentiated (γ > 1: LTP [P]) and depressed (γ < 1: LTD [P]),
    each 0 … 1, and γ's min and max.
    """
    attached = _attached(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    layers = {}
    for link in attached.links:
        gamma = model.get_submodule(link.layer).gamma
        if gamma is not None:
            layers[link.layer] = {
                "potentiated": (gamma > 1).float().mean().item(),
                "depressed": (gamma < 1).float().mean().item(),
                "min": gamma.min().item(),
                "max": gamma.max().item(),
            }
    percent = 100 * trainable / total
    return {"trainable": trainable, "total": total, "percent": percent, "layers": layers}
