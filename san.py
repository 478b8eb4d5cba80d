"""SAN (Synapse and Neuron) fine-tuning in one file that needs torch alone: copy it and use it.

A frozen layer l computes z = W_l x + b_l. SAN trains one vector γ_l for it and uses it twice. The
layer that reads l's output channels is l's posterior, and l is its anterior; here it is l + 1,
whatever stands between them (an activation, a norm, attention).

1. feature scaling (the neuron):    y = γ_l ⊙ z, optionally + β_l;
2. propagation (the synapse):       W_{l+1} diag(γ_l) in place of the posterior's W_{l+1};
3. merge, after training:           W* = diag(γ_l) W_l diag(γ_{l-1}),  b* = γ_l ⊙ b_l + β_l.

The merge is exact, up to rounding: both diagonals stand next to the same matrix, so nothing is
assumed of what lies between the layers. In the code γ' is the anterior's γ as this layer reads it.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class _Scale(torch.autograd.Function):
    """γ ⊙ x + β, as autograd would do it but with one buffer where it takes three.

    These products are bound by memory, not arithmetic, so that fewer buffers are a faster step.
    dx = γ ⊙ g, dγ = Σ g ⊙ x, dβ = Σ g, summed over all but channels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.shift = beta is not None
        return (x * gamma if beta is None else torch.addcmul(beta, x, gamma)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        g = g.to(gamma.dtype)
        beta_gradient = g.sum_to_size(gamma.shape) if ctx.shift else None
        buffer = g * x
        gamma_gradient = buffer.sum_to_size(gamma.shape).clone()  # may be the buffer itself
        if not ctx.needs_input_grad[0]:
            return None, gamma_gradient, beta_gradient
        return torch.mul(g, gamma, out=buffer).to(x.dtype), gamma_gradient, beta_gradient


class SANLayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d between its two diagonals:

        y = γ ⊙ ( (W diag(γ')) x + b ) + β

    x: …×in for Linear, …×in×H×W for Conv2d; γ, β: out; γ': the anterior layer's own γ, brought
    to this layer's `in` channels by the index. γ is ones and β zeros at the start.

    Without `features`, γ does not act here, only in the posterior layers that read it; gamma is
    None where nothing would read it either.
    """

    def __init__(self, layer: nn.Module, train_gamma: bool, train_beta: bool, features: bool):
        super().__init__()
        weight = layer.weight
        # trained in float32 at least: steps near 1 are lost to half precision's rounding
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ones = torch.ones(len(weight), dtype=dtype, device=weight.device)
        self.layer = layer
        self.gamma = nn.Parameter(ones) if train_gamma else None
        self.beta = nn.Parameter(torch.zeros_like(ones)) if train_beta else None
        self.features = features
        self.enabled = True
        # In a tuple, so that torch does not register the anterior layer as a part of this one:
        # its γ is shared, and stays one parameter under one name.
        self.anterior: tuple[SANLayer, ...] = ()
        self.register_buffer("index", None, persistent=False)

    def anterior_gamma(self) -> Tensor | None:
        """γ', one entry per input channel, or None without an anterior layer."""
        if not self.anterior:
            return None
        gamma = self.anterior[0].gamma
        return gamma if self.index is None else gamma[self.index]

    def forward(self, x: Tensor) -> Tensor:
        """The cheap form: (W diag(γ')) x = W (γ' ⊙ x), so autograd never builds W's gradient.

        It holds for padded convolutions too: what is padded is zero, or a copy of scaled values.
        """
        if not self.enabled:
            return self.layer(x)
        x = self._scale(x, self.anterior_gamma())  # 2. propagation, moved from the weight to x
        z = self.layer(x)
        return self._scale(z, self.gamma if self.features else None, self.beta)  # 1. features

    def forward_explicit(self, x: Tensor) -> Tensor:
        """The same as `forward`, as the paper writes it: γ' acts on the weight's columns."""
        weight = self.layer.weight * self._columns(self.anterior_gamma())
        weight = weight.to(self.layer.weight.dtype)
        if isinstance(self.layer, nn.Linear):
            z = nn.functional.linear(x, weight, self.layer.bias)
        else:
            z = self.layer._conv_forward(x, weight, self.layer.bias)
        return self._scale(z, self.gamma if self.features else None, self.beta)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself, now with W* = diag(γ) W diag(γ') and b* = γ ⊙ b + β; drop this one.

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
        if gamma is None:
            return (x + beta).to(x.dtype)
        return _Scale.apply(x, gamma, beta)

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
    disabled: bool = False


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
    fit, a layer other than nn.Linear and nn.Conv2d, or a weight tied to another layer's. A parent
    that reads `layer.weight` instead of calling the layer (nn.TransformerEncoderLayer's fast path)
    cannot be adapted.
    """
    if hasattr(model, "_san"):
        raise ValueError("this model has SAN layers already; merge or detach it first")
    if mode not in MODES:
        raise ValueError(f"mode '{mode}' is unknown; choose one of {', '.join(MODES)}")
    links = [Link(*link) for link in links]
    trainable = [trainable] if isinstance(trainable, str) else list(trainable)
    modules = dict(model.named_modules(remove_duplicate=False))
    links = _check(model, links, modules)
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
        base_shapes=_shapes(state),
    )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in first_values:
            parameter.requires_grad_(True)
    anteriors = {link.anterior for link in links}
    layers = {}
    for link in links:
        layer = modules[link.layer]
        layers[link.layer] = SANLayer(
            layer,
            train_gamma=mode != "propagation" or link.layer in anteriors,
            train_beta=shift and layer.bias is not None,
            features=mode != "propagation",
        )
        layers[link.layer].train(layer.training)
        _replace(model, link.layer, layers[link.layer])
    for link in links:
        if link.anterior is not None and mode != "feature":
            layers[link.layer].anterior = (layers[link.anterior],)
            layers[link.layer].index = link.index


def _check(model: nn.Module, links: list[Link], modules: dict) -> list[Link]:
    """Raise for the first link that cannot be made; give the links, their indices as tensors."""
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
    return [link._replace(index=_check_index(link, names, modules)) for link in links]


def _check_index(link: Link, names: list[str], modules: dict) -> Tensor | None:
    layer, anterior, index = link
    if anterior is None:
        if index is not None:
            raise ValueError(f"layer '{layer}' has an index but no anterior layer to read")
        return None
    if anterior == layer:
        raise ValueError(f"layer '{layer}' is linked to itself; its anterior is the layer it reads")
    if anterior not in names:
        raise ValueError(
            f"the anterior '{anterior}' of layer '{layer}' is not adapted; link it as well"
            f"{_closest(anterior, names)}"
        )
    weight = modules[layer].weight
    inputs = weight.shape[1] * getattr(modules[layer], "groups", 1)
    outputs = len(modules[anterior].weight)
    index = index if index is None else list(index)
    length = outputs if index is None else len(index)
    if length != inputs:
        what = f"'{anterior}' has" if index is None else "the index has"
        raise ValueError(
            f"layer '{layer}' reads {inputs} channels but {what} {length}; give an index of "
            f"{inputs} channels of '{anterior}'"
        )
    if index is None:
        return None
    numbers = [i.item() if isinstance(i, Tensor) else i for i in index]
    if not all(type(i) is int and 0 <= i < outputs for i in numbers):
        raise ValueError(
            f"the index of layer '{layer}' must be whole numbers from 0 to {outputs - 1}, the "
            f"output channels of '{anterior}'"
        )
    return torch.tensor(numbers, device=weight.device)


def detach(model: nn.Module) -> None:
    """Give the base model back, bit for bit: its layers, and the first values of `trainable`.

    A head put in place since then is the caller's own and stays. Raises ValueError for a model
    without SAN layers or with them disabled.
    """
    attached = _attached(model)
    _put(model, attached.first_values)
    for link in attached.links:
        _replace(model, link.layer, model.get_submodule(link.layer).layer)
    _forget(model, attached)


def merge(model: nn.Module) -> None:
    """Fold every γ and β into plain layers of the original classes, as `SANLayer.merged` writes.

    What `trainable` named keeps its trained values. The keys, classes and parameter count are the
    base model's again. Raises ValueError for a model without SAN layers or with them disabled.
    """
    attached = _attached(model)
    for link in attached.links:
        _replace(model, link.layer, model.get_submodule(link.layer).merged())
    _forget(model, attached)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes the base model's output; afterwards the adapted one's again.

    Raises ValueError for a model without SAN layers.
    """
    if hasattr(model, "_san") and model._san.disabled:  # inside another `disabled`
        yield
        return
    attached = _attached(model)
    layers = [model.get_submodule(link.layer) for link in attached.links]
    state = model.state_dict()
    trained = {key: state[key].clone() for key in attached.first_values if key in state}
    try:
        attached.disabled = True
        for layer in layers:
            layer.enabled = False
        _put(model, attached.first_values)
        yield
    finally:
        attached.disabled = False
        for layer in layers:
            layer.enabled = True
        _put(model, trained)


def _attached(model: nn.Module) -> _Attached:
    if not hasattr(model, "_san"):
        raise ValueError("this model has no SAN layers (never attached, or merged or detached)")
    if model._san.disabled:
        raise ValueError("the SAN layers are disabled; do this outside of `disabled`")
    return model._san


def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for key, value in values.items():
        if key in state and state[key].shape == value.shape:  # a head put there since is not ours
            state[key].data.copy_(value)  # .data: a backward pass may be under way


def _shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


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


def write(content: Any, path: str | os.PathLike, save: Callable | None = None) -> None:
    """save(content, file), torch.save by default, to a temporary file that is then renamed.

    The file is whole or absent, whatever happens. Raises OSError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (save or torch.save)(content, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.exists():
            temporary.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # a full disk is a RuntimeError to torch
            raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error
        raise


def read(path: str | os.PathLike) -> Any:
    """torch.load of tensors and plain values onto the CPU; code in the file is never executed.

    Raises FileNotFoundError if it is missing, OSError if it is broken or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise OSError(f"could not read {path}: {error.strerror or error}") from error
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
    settings = {key: getattr(attached, key) for key in ("mode", "shift", "trainable")}
    content = {"links": [tuple(link) for link in attached.links], "settings": settings}
    content |= {"san": 1, "base_shapes": attached.base_shapes, "values": _trained(model)}
    write(content, path)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by state-dict key: every γ and β, and what `trainable` named."""
    keys = {f"{link.layer}.{v}" for link in model._san.links for v in ("gamma", "beta")}
    keys |= {*model._san.first_values}
    return {key: value.clone() for key, value in model.state_dict().items() if key in keys}


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
    own = _shapes(model.state_dict())
    try:
        base = dict(content["base_shapes"])
        differ = [key for key in dict.fromkeys([*base, *own]) if base.get(key) != own.get(key)]
        first = [
            f"{key} ({base.get(key, 'missing')} there, {own.get(key, 'missing')} here)"
            for key in differ[:3]
        ]
        if differ:
            raise ValueError(f"{path} was trained on another base model: {'; '.join(first)}")
        attach(model, content["links"], **content["settings"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a broken adapter: {error!r}") from error
    values = content.get("values")
    if not isinstance(values, dict) or _shapes(values) != _shapes(_trained(model)):
        detach(model)
        raise ValueError(f"{path} is a broken adapter: its values do not fit its own links")
    _put(model, values)


def summary(model: nn.Module) -> dict[str, Any]:
    """Counts of the adapted model's parameters, and what each layer's γ has become.

    trainable, total: numbers of parameters; percent: 100 · trainable / total;
    layers: name → share of channels potentiated (γ > 1, long-term potentiation [P]) and depressed
    (γ < 1, long-term depression [P]), each 0 … 1, and γ's min and max.
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
