"""SAN (Synapse and Neuron) fine-tuning in one file that needs torch alone: copy it and use it.

B reads A's output: A is B's anterior, B is A's posterior. A frozen layer computes W x + b; SAN
trains one vector γ per layer and uses it twice. γ' is the anterior's γ.

1. feature scaling (the neuron):    y = γ ⊙ (W x + b), with `shift` also + β;
2. propagation (the synapse):       W diag(γ') in place of W;
3. merge, after training:           W* = diag(γ) W diag(γ'),  b* = γ ⊙ b + β.

The merge is exact up to rounding, whatever lies between the layers (an activation, a norm,
attention): each diagonal stands next to the matrix it folds into.

    links = [Link("fc1"), Link("fc2", anterior="fc1")]
    attach(model, links, shift=True, trainable=["norm", "head"])
    ...                                    # train the parameters that require a gradient
    save_adapter(model, "adapter.pt")      # kilobytes
    merge(model)                           # plain layers again

Besides: `detach` gives the base model back, `disabled` its output for a while, `load_adapter`
brings back what was saved, `summary` tells what γ became. Python 3.10 and torch 2.6 at least. MIT
licence.

Sources: [P] Dai et al., "SAN", ICML 2025, arXiv 2409.06706; [C] its authors' v1 code; [S] SSF,
Lian et al., NeurIPS 2022, arXiv 2210.08823; [us] our choice. The formulas are [P, C], β is SSF's
[S], the links and all that stands below the rule are ours.
"""

import difflib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel


class Link(NamedTuple):
    """One adapted layer, the anterior layer whose γ it reads (None: none), and how.

    index: index[i] is the output channel of `anterior` that arrives at input channel i of `layer`;
    None: channel i itself. A slice, the value third of qkv: range(2 * dim, 3 * dim). A repeat, 4
    places per channel after a flatten: [c for c in range(channels) for _ in range(4)].
    """

    layer: str  # names as in model.named_modules()
    anterior: str | None = None
    index: Sequence[int] | None = None


class SANLayer(nn.Module):
    """A frozen layer between its two diagonals:  y = γ ⊙ ( (W diag(γ')) x + b ) + β.

    x: …×in for Linear, …×in×places for ConvNd; y: the same with `out`. γ, β: out, ones and zeros
    at the start. γ': in, the anterior's own γ, brought to this layer's inputs by the index.
    Without `scale`, γ acts in the posterior layers alone.
    """

    def __init__(self, layer: nn.Module, with_gamma: bool, with_beta: bool, scale: bool):
        super().__init__()
        vars(self).update(_described(layer))  # what a parent may read: in_features, stride, …
        self.layer, self.axes = layer, _axes(layer)
        self.gamma = nn.Parameter(_ones(layer)) if with_gamma else None
        self.beta = nn.Parameter(0 * _ones(layer)) if with_beta else None
        self.scale, self.used, self.early = scale, False, False
        self.anterior: tuple[SANLayer, ...] = ()  # a tuple: its γ is shared, and no part of ours
        self.register_buffer("index", None, persistent=False)

    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """γ', γ and β as they act on this layer, or None."""
        anterior_gamma = _whole(self.anterior[0].gamma) if self.anterior else None
        if self.index is not None:
            anterior_gamma = anterior_gamma[self.index.to(anterior_gamma.device)]
        return anterior_gamma, _whole(self.gamma) if self.scale else None, _whole(self.beta)

    def forward(self, input: Tensor) -> Tensor:  # called as in nn.Linear; x in the formulas
        """First read (2), then write (1).

        (W diag(γ')) x = W (γ' ⊙ x), so x is scaled and not W. W is frozen, but W diag(γ') is not:
        its gradient, out×in, would cost as much per step as fine-tuning W.
        """
        _mark_run(self)  # for the warning at the model's first forward
        anterior_gamma, gamma, beta = self.vectors()
        z = self.layer(_affine(anterior_gamma, input, None, self.axes.spatial))  # W (γ' ⊙ x) + b
        return _affine(gamma, z, beta, self.axes.spatial)  # γ ⊙ z + β

    def forward_explicit(self, x: Tensor) -> Tensor:
        """The same, as the paper writes it, for readers and tests: γ' acts on W's columns."""
        anterior_gamma, gamma, beta = self.vectors()
        weight = self.layer.weight * _columns(anterior_gamma, self.axes)
        z = torch.func.functional_call(self.layer, {"weight": weight.to(self.layer.weight)}, x)
        return _affine(gamma, z, beta, self.axes.spatial)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W* = diag(γ) W diag(γ') and b* = γ ⊙ b + β, in float32 at least, then rounded once."""
        weight, bias = _whole(self.layer.weight), _whole(self.layer.bias)
        vectors = [v if v is None else v.to(weight.device) for v in self.vectors()]
        anterior_gamma, gamma, beta = vectors
        merged = _rows(gamma, self.axes) * _wide(weight) * _columns(anterior_gamma, self.axes)
        if bias is not None:
            bias = _affine(gamma, _wide(bias), beta, spatial=0).to(bias.dtype)
        return merged.to(weight.dtype), bias

    @property
    def weight(self) -> Tensor:
        """W*, for whoever reads this layer instead of calling it; writes to it are lost."""
        return _mark_used(self).merged()[0]

    @property
    def bias(self) -> Tensor | None:
        """b*, likewise."""
        return _mark_used(self).merged()[1]


def attach(
    model: nn.Module,
    links: Iterable[Link],
    *,
    scale: bool = True,
    propagate: bool = True,
    shift: bool = False,
    trainable: Iterable[str] = (),
) -> None:
    """Freeze `model` and put a SAN layer in place of each linked layer; its output stays the same.

    scale, propagate: the two uses of γ; one of them alone is the ablation of [C].
    shift: train β as well; with propagate=False that is SSF [S]. A layer without a bias gets no
    β, since nothing in the base model could hold it after the merge [us].
    trainable: names of modules or parameters to train besides, such as norms and the head [C].
    Before: bring the model to its dtype. After: make the optimizer (without weight decay on γ,
    which would pull it to 0), then DDP or FSDP. Until `merge` or `detach` a layer is a SANLayer,
    its keys are fc1.layer.weight in place of fc1.weight, and fc1.weight is a copy of W*, to read
    and not to write. What trains is kept in float32: a half-precision norm's weight is then
    norm.parametrizations.weight.original. A BatchNorm in training normalises the γ and β of the
    layer before it away: of the two uses of γ, propagation alone is left.
    Names and sizes of the links are checked; which layer reads which is the caller's knowledge: a
    wrong link trains and merges all the same.
    Raises ValueError or TypeError for what cannot be adapted, and leaves the model as it was.
    """
    settings = {"scale": scale, "propagate": propagate, "shift": shift}
    model, links, keys = _check(model, links, trainable, settings)
    _remember(model, links, keys, settings)
    _freeze(model, keys)
    _wire(model, links, settings)


def merge(model: nn.Module) -> None:
    """Put W* and b* in place of W and b; layers and keys are the base model's own again.

    What else was trained keeps its values, and whether a parameter requires a gradient is as before
    `attach`. The merged weights are new parameters, which an older optimizer does not reach; hooks
    on a SAN layer go with it. Raises ValueError, and leaves the model as it was, where a merged
    weight would not be finite.
    """
    model, layers = _adapted(model)
    _look_again(model, layers)
    for name, layer in layers.items():  # all are checked before any is changed
        _require_mergeable(name, layer)
    for name, layer in layers.items():
        _replace(model, name, _fold(layer))
    _forget(model)


def detach(model: nn.Module) -> None:
    """Give the whole base model back, bit for bit: its layers, parameters and buffers.

    Raises ValueError, and changes nothing, where something that `trainable` does not name was set
    to train or given other values after `attach`: its base value is not kept. Up to sixteen entries
    of each tensor are compared; a change of others alone goes unnoticed.
    """
    model, _ = _adapted(model)
    _require_remembered(model)
    _put_base_layers(model)
    _put(model, model._san.values)
    _forget(model)


# ==================================================================================================
# The method ends here. Below: what its steps call, the faster product, what is refused, what is
# remembered, files, a summary.
# ==================================================================================================


def _wire(model: nn.Module, links: list[Link], settings: dict[str, bool]) -> None:
    modules, layers = _modules(model), {}
    anteriors = {link.anterior for link in links}
    for link in links:
        layer = modules[link.layer]
        layers[link.layer] = SANLayer(
            layer,
            with_gamma=settings["scale"] or link.layer in anteriors,
            with_beta=settings["shift"] and layer.bias is not None,
            scale=settings["scale"],
        )
        _replace(model, link.layer, layers[link.layer])
    for link in links:
        if link.anterior is not None and settings["propagate"]:
            layers[link.layer].anterior = (layers[link.anterior],)
            layers[link.layer].index = link.index
    model.register_forward_hook(_look_at_first_forward)


@torch.inference_mode(False)  # a merged model may be trained on
@torch.no_grad()
def _fold(layer: SANLayer) -> nn.Module:
    """The layer itself, with its merged weight and bias."""
    for name, new in zip(("weight", "bias"), layer.merged()):
        old = getattr(layer.layer, name)
        if hasattr(old, "full_tensor"):  # FSDP2 holds on to the parameter, so it stays
            _write(old, new)
        elif new is not None:
            layer.layer._parameters[name] = nn.Parameter(new, requires_grad=False)
    return layer.layer


class _Axes(NamedTuple):
    """How a layer's weight and its pictures lie."""

    spatial: int  # axes of a picture after its channels: 0 for Linear, n for ConvNd
    groups: int
    outputs: int
    inputs: int
    first_in: bool  # the weight is in×out, as transformers' Conv1D has it


def _axes(layer: nn.Module) -> _Axes:
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    first_in = _is_conv1d_of_transformers(layer)
    outputs, inputs = reversed(shape[:2]) if first_in else shape[:2]
    return _Axes(len(shape) - 2, groups, outputs, groups * inputs, first_in)


def _is_conv1d_of_transformers(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d)


def _described(layer: nn.Module) -> dict[str, Any]:
    """The numbers and words that a layer keeps of itself."""
    plain = int | float | str | tuple
    return {k: v for k, v in vars(layer).items() if isinstance(v, plain) and k[0] != "_"}


def _rows(gamma: Tensor | None, axes: _Axes) -> Tensor | float:
    """γ in a shape that scales the output rows of the weight."""
    if gamma is None:
        return 1.0
    if axes.first_in:
        return gamma
    return gamma.view(-1, 1, *[1] * axes.spatial)


def _columns(gamma: Tensor | None, axes: _Axes) -> Tensor | float:
    """γ' in a shape that scales the input columns of the weight.

    A convolution in g groups has a weight out×in/g×places: output channels of group i read input
    channels i·in/g … (i+1)·in/g − 1, so each group's rows get their own stretch of γ'.
    """
    if gamma is None:
        return 1.0
    if axes.first_in:
        return gamma[:, None]
    rows = gamma.view(axes.groups, 1, -1).expand(-1, axes.outputs // axes.groups, -1)
    return rows.flatten(0, 1).view(axes.outputs, -1, *[1] * axes.spatial)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: steps near 1, and products, are lost to half precision's rounding."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ones(layer: nn.Module) -> Tensor:
    """One per output channel."""
    return _wide(layer.weight.detach().new_ones(_axes(layer).outputs))


def _whole(tensor: Tensor | None) -> Tensor | None:
    """What FSDP2 has sharded, gathered; any other tensor as it is.

    FSDP2 gathers a γ for its own block alone, so that a posterior in another block does it here.
    The gradient is FSDP2's: the mean over processes.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # summed over processes
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _write(tensor: Tensor, value: Tensor) -> None:
    """Into the tensor itself; of one that FSDP2 has sharded, into every process's shard."""
    if hasattr(tensor, "full_tensor") and not hasattr(value, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.dtype), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def _reshard(model: nn.Module) -> None:
    """What FSDP2 has gathered is a copy, which it throws away with all that is written to it."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # FSDP2 has made it an FSDPModule
            module.reshard()


def _mark_run(layer: SANLayer) -> None:
    if not torch.compiler.is_compiling():
        layer.early |= not layer.used and any(not anterior.used for anterior in layer.anterior)
    _mark_used(layer)


def _mark_used(layer: SANLayer) -> SANLayer:
    if not torch.compiler.is_compiling():  # where it would be one more thing to guard
        layer.used = True
    return layer


# ---------------------------------------------------------------------------- the faster product


def _affine(gamma: Tensor | None, x: Tensor, beta: Tensor | None, spatial: int) -> Tensor:
    """γ ⊙ x + β along the channels of x, which stand before `spatial` more axes.

    Computed in γ's precision, returned in x's.
    """
    if gamma is None and beta is None:
        return x
    shape = (-1, *[1] * spatial)
    gamma, beta = (v if v is None else v.to(x.device).view(shape) for v in (gamma, beta))
    if gamma is None:
        return (x + beta).to(x.dtype)
    # compile fuses this by itself; of forward-mode derivatives, which may be nested, autograd knows
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return (gamma * x if beta is None else gamma * x + beta).to(x.dtype)
    return _OneBuffer.apply(x, gamma, beta)


class _OneBuffer(torch.autograd.Function):
    """γ ⊙ x + β, as autograd would do it but with one buffer where it takes three.

    These products are bound by memory, not arithmetic, so that fewer buffers are a faster step.
    dx = γ ⊙ g, dγ = Σ g ⊙ x, dβ = Σ g, summed over all but channels.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
        return (x * gamma if beta is None else torch.addcmul(beta, x, gamma)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, gamma, beta = inputs
        ctx.save_for_backward(x, gamma)
        ctx.shift = beta is not None

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        g = g.to(gamma.dtype)
        beta_gradient = g.sum_to_size(gamma.shape) if ctx.shift else None
        product = g * x
        gamma_gradient = product.sum_to_size(gamma.shape)
        if not ctx.needs_input_grad[0]:
            return None, gamma_gradient, beta_gradient
        gamma_gradient = gamma_gradient.clone()  # it may be the product itself
        try:
            x_gradient = torch.mul(g, gamma, out=product)
        except RuntimeError:  # vmap, and a gradient of this gradient, know no `out`
            x_gradient = g * gamma
        return x_gradient.to(x.dtype), gamma_gradient, beta_gradient


# -------------------------------------------------------------------- names, seen through wrappers

# what torch.compile, checkpoint_wrapper and FSDP put into the names of what they wrap
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# who call what they hold `module`
_HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def _unwrapped(module: nn.Module, ddp: bool = True) -> nn.Module:
    """What torch.compile, DistributedDataParallel and their like wrap, however deep."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel) and not ddp:
            raise ValueError(
                "DistributedDataParallel counts the parameters when it wraps a model; adapt the "
                "model first, then wrap it"
            )
        names = ("module",) if isinstance(module, _HOLDERS) else _WRAPPERS
        inner = [name for name in names if name in module._modules]
        if not inner:
            return module
        module = module._modules[inner[0]]


def _plain(name: str) -> str:
    """A name without its wrappers, and a parametrized weight's as if it were a plain one."""
    if not isinstance(name, str):
        kind = type(name).__name__
        raise TypeError(f"a {kind} is no name; give its name, as model.named_modules() has it")
    parts = [part for part in name.split(".") if part and part not in _WRAPPERS]
    if len(parts) > 2 and parts[-3] == "parametrizations" and parts[-1] == "original":
        parts[-3:] = [parts[-2]]
    return ".".join(parts)


def _each(given: Any) -> list:
    """The entries of what the caller gave; one that stands alone is the only one."""
    alone = isinstance(given, str | Link) or not isinstance(given, Iterable)
    return [given] if alone else [*given]


def _plain_link(link: Any) -> Link:
    if not (isinstance(link, tuple | list) and 1 <= len(link) <= 3):
        raise TypeError(f"a {type(link).__name__} is no link; write Link(layer, anterior, index)")
    layer, anterior, index = Link(*link)
    return Link(_plain(layer), None if anterior is None else _plain(anterior), index)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name → module; of a wrapper and what it wraps, the latter."""
    return {_plain(name): m for name, m in model.named_modules(remove_duplicate=False)}


def _tensors(model: nn.Module, saved: bool = False) -> dict[str, Tensor]:
    """Plain name → parameter or buffer; `saved`: without buffers that no state dict holds."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set if saved else ()
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in passing:
                found[_plain(f"{prefix}.{name}")] = tensor
    return found


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in a layer's place; the base's own comes back in what wrapped it."""
    parent, _, child = name.rpartition(".")
    for path, _, _, base in model._san.children:
        if path == name and _unwrapped(base) is new:
            new = base
            break
    setattr(_modules(model)[parent], child, new)


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, filter(None, names), n=3, cutoff=0.4)
    return f"; the closest names are {', '.join(close)}" if close else ""


# ---------------------------------------------------------------------------- attach's first step


def _check(
    model: nn.Module, links: Iterable[Link], trainable: Iterable[str], settings: dict[str, bool]
) -> tuple[nn.Module, list[Link], list[str]]:
    """The model itself, its links with indices as tensors, the names of all that is to train.

    Raises ValueError or TypeError for the first thing that is not right.
    """
    model = _unwrapped(model, ddp=False)
    if place := _where_attached(model):
        raise ValueError(f"{place} has SAN layers already; merge or detach it first")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError("what torch.inference_mode() makes cannot train; build and attach outside")
    links = [_plain_link(link) for link in _each(links)]
    if not links:
        raise ValueError("there is no link; name at least one layer to adapt")
    propagates = settings["propagate"] and any(link.anterior is not None for link in links)
    if not (settings["scale"] or propagates):
        raise ValueError("γ would act nowhere; leave scale on, or propagate it from an anterior")
    modules, tensors = _modules(model), _tensors(model)
    users: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        users.setdefault(id(tensor), []).append(name)
    names = [link.layer for link in links]
    for name in names:
        if not name:
            raise ValueError("a link names no layer; put a model that is one layer into another")
        if name not in modules:
            raise ValueError(f"the model has no layer '{name}'{_closest(name, modules)}")
        if names.count(name) > 1:
            raise ValueError(f"layer '{name}' is linked twice; give each layer one link")
        _check_layer(name, modules[name])
        for parameter in modules[name].parameters():
            if len(users[id(parameter)]) > 1:
                tied = " and ".join(f"'{user}'" for user in users[id(parameter)])
                raise ValueError(f"{tied} are one tied weight; copy or drop one, or unlink it")
    links = [link._replace(index=_check_index(link, names, modules)) for link in links]
    keys = _check_trainable(trainable, names, modules, tensors, users)
    return model, links, keys


def _check_trainable(
    trainable: Iterable[str],
    layers: list[str],
    modules: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    users: dict[int, list[str]],
) -> list[str]:
    """The names of all parameters that `trainable` names. Raises ValueError or TypeError."""
    keys = []
    for name in map(_plain, _each(trainable)):
        own = [k for k in tensors if k == name or k.startswith(f"{name}.")]
        own = [k for k in own if isinstance(tensors[k], nn.Parameter)]
        if not own and name and name in modules:
            raise ValueError(f"'{name}' has no parameters to train; leave it out of `trainable`")
        if not own:
            closest = _closest(name, [*modules, *tensors])
            raise ValueError(f"nothing to train is called '{name}'{closest}")
        for key in own:
            _require_values(key, tensors[key])
            if inside := [layer for layer in layers if key.startswith(f"{layer}.")]:
                raise ValueError(
                    f"'{key}' is in the linked layer '{inside[0]}', so frozen; leave one of the two"
                )
            parent, _, last = key.rpartition(".")
            tied = len(users[id(tensors[key])]) > 1
            computed = tied or last in getattr(modules[parent], "parametrizations", ())
            if computed and _wide(tensors[key]).dtype != tensors[key].dtype:
                raise ValueError(
                    f"'{key}' is {'tied' if tied else 'parametrized'} and {tensors[key].dtype}, "
                    "too coarse to train in; make the model float32, or leave it frozen"
                )
        keys += own
    return keys


def _check_layer(name: str, layer: nn.Module) -> None:
    """Raise for a layer whose output is not W x + b with a weight that can be scaled."""
    kind = type(layer).__name__
    if not isinstance(layer, _KNOWN) and not _is_conv1d_of_transformers(layer):
        if kind in [known.__name__ for known in _KNOWN]:  # another's class of the same name
            kind = f"{type(layer).__module__}.{kind}"
        raise TypeError(
            f"layer '{name}' is a {kind}; SAN adapts Linear, Conv1d, Conv2d and Conv3d, their "
            "subclasses, and transformers' Conv1D, so unlink it"
        )
    weight, own = layer._parameters.get("weight"), layer._parameters
    if weight is None or any(getattr(layer, n) is not own.get(n) for n in ("weight", "bias")):
        raise ValueError(
            f"layer '{name}' computes its weight or bias anew for every call (weight_norm, "
            "spectral_norm, pruning or a parametrization); make it plain first, by "
            "remove_weight_norm, remove_spectral_norm, prune.remove or "
            "parametrize.remove_parametrizations"
        )
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"layer '{name}' is not initialised yet; run the model once first")
    _require_values(f"{name}.weight", weight)
    if not weight.is_floating_point() or weight.element_size() < 2:
        what = "complex," if weight.is_complex() else "quantised to"
        raise TypeError(f"layer '{name}' is {what} {weight.dtype}; load it in float32 or bfloat16")
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"layer '{name}' is sharded; adapt the model first, then shard it")
    if type(weight.data) is not Tensor or weight.ndim < 2:
        raise TypeError(
            f"the weight of layer '{name}' is a {type(weight.data).__name__}, not plain; unlink it"
        )
    if taken := {*_OWN, *dir(SANLayer)} & vars(layer).keys() - {"forward"}:
        raise ValueError(
            f"layer '{name}' keeps something called '{min(taken)}', and a SAN layer something else "
            "under that name; rename it"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        warnings.warn(
            f"layer '{name}' has hooks; the merge is exact only if they leave what passes as it is",
            stacklevel=4,
        )
    if type(layer) not in _KNOWN and not _is_linear(layer):
        raise TypeError(
            f"layer '{name}', a {kind}, does not compute W x + b with its weight as it is, so that "
            "nothing could be folded into it; unlink it"
        )


_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# of a SANLayer
_OWN = ("layer", "axes", "scale", "used", "early", "gamma", "beta", "anterior", "index")


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Ask it: is its output with diag(r) W diag(c) and r ⊙ b + s that of r ⊙ layer(c ⊙ x) + s?

    Of random numbers. A layer that standardises its weight, masks it, reads another one, applies
    more than it or takes more than x says no.
    """
    axes, generator = _axes(layer), torch.Generator().manual_seed(0)
    kernel, dilation = layer.weight.shape[2:], getattr(layer, "dilation", ())

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x = draw(1, axes.inputs, *(2 + d * k for k, d in zip(kernel, dilation)))
    rows, columns, shift = draw(axes.outputs), draw(axes.inputs), draw(axes.outputs)
    shift = None if layer.bias is None else shift
    try:
        layer = deepcopy(layer).to("cpu", torch.float64).eval()
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        scaled = {"weight": _rows(rows, axes) * layer.weight * _columns(columns, axes)}
        if layer.bias is not None:
            scaled["bias"] = rows * layer.bias + shift
        z = layer(_affine(columns, x, None, axes.spatial))
        expected = _affine(rows, z, shift, axes.spatial)
        return torch.allclose(torch.func.functional_call(layer, scaled, x), expected)
    except Exception:  # whatever a layer raises that is given less, or other, than it takes
        return False


def _check_index(link: Link, names: list[str], modules: dict[str, nn.Module]) -> Tensor | None:
    layer, anterior, index = link
    if anterior is None:
        if index is not None:
            raise ValueError(f"layer '{layer}' has an index but no anterior; name one or drop it")
        return None
    if anterior == layer:
        raise ValueError(f"layer '{layer}' is linked to itself; its anterior is the layer it reads")
    if anterior not in names:
        raise ValueError(
            f"the anterior '{anterior}' of layer '{layer}' is not adapted; link it as well"
            f"{_closest(anterior, names)}"
        )
    inputs, outputs = _axes(modules[layer]).inputs, _axes(modules[anterior]).outputs
    index = range(outputs)[index] if isinstance(index, slice) else index
    if index is not None:  # numpy's and torch's numbers become Python's
        index = [i.tolist() if hasattr(i, "tolist") else i for i in _each(index)]
    length = outputs if index is None else len(index)
    if length != inputs:
        what = f"'{anterior}' has" if index is None else "the index has"
        raise ValueError(
            f"layer '{layer}' reads {inputs} channels but {what} {length}; give an index of "
            f"{inputs} channels of '{anterior}'"
        )
    if index is None:
        return None
    if not all(type(i) is int and 0 <= i < outputs for i in index):
        raise ValueError(
            f"the index of layer '{layer}' must be whole numbers from 0 to {outputs - 1}, the "
            f"output channels of '{anterior}'"
        )
    return torch.tensor(index, device=modules[layer].weight.device)


# --------------------------------------------------- attach's other steps; what is remembered


@dataclass
class _Attached:
    """What a model with SAN layers remembers of its base."""

    links: list[Link]
    settings: dict[str, bool]
    trainable: list[str]
    children: list[tuple[str, nn.Module, str, nn.Module]]  # name, parent, name in it, child
    values: dict[str, Tensor | None]  # of what `trainable` names and of every buffer
    shapes: dict[str, list[int]]  # of all that a state dict holds
    samples: dict[str, Tensor]  # of the same
    required_grad: dict[str, bool]
    disabled: bool = False


def _remember(model: nn.Module, links: list[Link], trainable: list[str], settings: dict) -> None:
    tensors, saved = _tensors(model), _tensors(model, saved=True)
    kept = {key: tensors[key] for key in trainable}
    for name, module in model.named_modules(remove_duplicate=False):
        kept |= {_plain(f"{name}.{own}"): buffer for own, buffer in module._buffers.items()}
    model._san = _Attached(
        links=links,
        settings=settings,
        trainable=trainable,
        children=[
            (_plain(f"{name}.{child_name}"), module, child_name, child)
            for name, module in model.named_modules(remove_duplicate=False)
            for child_name, child in module._modules.items()
            if child is not None
        ],
        values={key: v if v is None else v.detach().clone() for key, v in kept.items()},
        shapes=_shapes(saved),
        samples={key: _sample(tensor) for key, tensor in saved.items()},
        required_grad={k: v.requires_grad for k, v in tensors.items()},
    )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in tensors.items()}


def _sample(tensor: Tensor) -> Tensor:
    """Up to sixteen entries, enough to tell it from others of its shape; none of what is sharded,
    quantised or not there, as on the meta device."""
    if not is_dense(tensor) or type(tensor.data) is not Tensor:
        return torch.empty(0)
    count = min(16, tensor.numel())
    chosen = torch.arange(count) * (tensor.numel() - 1) // max(1, count - 1)
    return tensor.detach().flatten()[chosen.to(tensor.device)].float().cpu()


def _same(there: Tensor, here: Tensor) -> bool:
    """Whether two samples are of the same values, whatever type these were rounded to."""
    if not (len(there) and len(here)):
        return True
    # half of bfloat16's last place is 1/256 of a value; float16's smallest numbers are 6e-8 apart
    return torch.allclose(here, there, rtol=0.005, atol=1e-7, equal_nan=True)


def _changed(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether a frozen tensor was given other values after attach, as far as its sample tells."""
    layer, _, name = key.rpartition(".layer.")  # of what a SAN layer holds
    samples = model._san.samples
    there = samples.get(key, samples.get(f"{layer}.{name}"))
    if there is None:
        return False
    here = _sample(tensor)
    return len(there) != len(here) > 0 or not _same(there, here)


class _Rounded(nn.Module):
    """A parametrization: a float32 weight, rounded where it is used."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()  # in a buffer, the type follows model.float()
        self.register_buffer("as_of", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.as_of.dtype)


def _freeze(model: nn.Module, trainable: list[str]) -> None:
    """Freeze all but `trainable`, which trains in float32 at least, whatever it is rounded to."""
    model.requires_grad_(False)
    modules, tensors = _modules(model), _tensors(model)
    for key in trainable:
        parent, _, name = key.rpartition(".")
        module, dtype = modules[parent], tensors[key].dtype
        if (wide := _wide(tensors[key])).dtype != dtype:
            module._parameters[name] = nn.Parameter(wide)
            parametrize.register_parametrization(module, name, _Rounded(dtype), unsafe=True)
    for key, tensor in _tensors(model).items():
        if key in trainable:
            tensor.requires_grad_(True)


def _look_at_first_forward(model: nn.Module, *_: Any) -> None:
    """Warn of linked layers that took no part in it or came too early, and of γ in half precision.

    That a link names the right anterior cannot be seen from here, but one that runs after its
    posterior is none.
    """
    if torch.compiler.is_compiling() or model._san.disabled:
        return
    _drop_hook(model)
    layers = _layers(model)
    silent = _silent(model)
    if unused := [n for n, m in layers.items() if not m.used and m not in silent]:
        warnings.warn(
            f"the model ran without its linked layers {', '.join(unused)}: their γ does not scale "
            "what they give out, but the merge folds it in; unlink what the model does not call",
            stacklevel=2,
        )
    ran = {m for m in layers.values() if m.used and m not in silent}
    if early := [n for n, m in layers.items() if m.early and m.anterior[0] in ran]:
        warnings.warn(
            f"{', '.join(early)} ran before the anterior that its link names; name the layer whose "
            "output it reads, unless it runs again and reads this one's then",
            stacklevel=2,
        )
    gammas = [layer.gamma for layer in layers.values() if layer.gamma is not None]
    if coarse := [gamma.dtype for gamma in gammas if _wide(gamma).dtype != gamma.dtype]:
        warnings.warn(
            f"γ has become {coarse[0]}, in which small steps near 1 are lost; bring the model to "
            "its type before attach, which keeps γ in float32",
            stacklevel=2,
        )


def _look_again(model: nn.Module, layers: dict[str, SANLayer]) -> None:
    """The same at the end, if any layer ran: in a part of the model alone, or before a .half()."""
    if any(layer.used for layer in layers.values()):
        _look_at_first_forward(model)


def _silent(model: nn.Module) -> set[nn.Module]:
    """What is inside of something compiled, and does not say whether it was used."""
    compiled = [m for m in model.modules() if "_orig_mod" in m._modules or m._compiled_call_impl]
    return {layer for module in compiled for layer in module.modules()}


def _drop_hook(model: nn.Module) -> None:
    for key, hook in [*model._forward_hooks.items()]:
        if hook is _look_at_first_forward:
            del model._forward_hooks[key]


def _adapted(model: nn.Module) -> tuple[nn.Module, dict[str, SANLayer]]:
    """The model itself and its SAN layers by name. Raises ValueError if it has none to use."""
    model = _unwrapped(model)
    if not hasattr(model, "_san"):
        if place := _where_attached(model):
            raise ValueError(f"{place} has the SAN layers; give that in place of this")
        raise ValueError("this model has no SAN layers (never attached, or merged or detached)")
    if model._san.disabled:
        raise ValueError("the SAN layers are disabled; do this outside of `disabled`")
    _reshard(model)
    layers = _layers(model)
    for name, layer in layers.items():
        for part, parameter in layer.named_parameters(recurse=False):
            _require_values(f"{name}.{part}", parameter)
    return model, layers


def _where_attached(model: nn.Module) -> str | None:
    """What `attach` was given, in words, if there is a SAN layer in this model."""
    for name, module in _modules(model).items():
        if hasattr(module, "_san"):
            return f"the part '{name}' of this model" if name else "this model"
        if isinstance(module, SANLayer):
            return "the model that this is a part of"
    return None


def _layers(model: nn.Module) -> dict[str, SANLayer]:
    modules = _modules(model)
    layers = {link.layer: modules.get(link.layer) for link in model._san.links}
    for name, layer in layers.items():
        if not isinstance(layer, SANLayer):
            raise ValueError(f"the linked layer '{name}' was taken out after attach; put it back")
    return layers


@torch.no_grad()
def _require_mergeable(name: str, layer: SANLayer) -> None:
    kind, weight = type(layer.layer).__name__, layer.layer._parameters.get("weight")
    if weight is None or layer.layer.weight is not weight:
        raise ValueError(
            f"inside of layer '{name}' there is now a {kind} that computes its weight itself, as "
            "LoRA does; merge that first, so that the plain layer is there again"
        )
    _require_finite(f"the merged weight of layer '{name}'", *layer.merged())


def _require_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"'{name}' is on the meta device, which holds no values: not loaded yet, or offloaded; "
            "load the model first, and offload it after the merge"
        )


def _require_finite(what: str, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(
                f"{what} is not finite in {tensor.dtype}; train with a smaller learning rate, or "
                "bring the model to a wider type first"
            )


def _replaced(model: nn.Module) -> tuple[str, ...]:
    """What names begin with in what the caller has put in place of children of the base."""
    found = ()
    for prefix, parent, name, child in model._san.children:
        now = parent._modules.get(name)
        now = None if now is None else _unwrapped(now)
        if now is not _unwrapped(child) and not isinstance(now, SANLayer):
            found += (f"{prefix}.",)
    return found


def _require_remembered(model: nn.Module) -> None:
    tensors = _tensors(model)
    names = [*model._san.trainable, *_gammas_and_betas(model)]
    kept = {id(tensors.get(name)) for name in names}  # what is tied has several names
    replaced = _replaced(model)
    for key, tensor in tensors.items():
        if id(tensor) in kept or key in model._san.values or key.startswith(replaced):
            continue
        if tensor.requires_grad or _changed(model, key, tensor):
            what = "set to train" if tensor.requires_grad else "given other values"
            raise ValueError(
                f"'{key}' was {what} after attach, so that its base value is not kept; name it in "
                "`trainable`, or load the base model anew"
            )


def _gammas_and_betas(model: nn.Module) -> set[str]:
    return {f"{link.layer}.{name}" for link in model._san.links for name in ("gamma", "beta")}


def _put_base_layers(model: nn.Module) -> None:
    for _, parent, name, child in model._san.children:
        if (now := parent._modules.get(name)) is None or _unwrapped(now) is not _unwrapped(child):
            parent._modules[name] = child
            if not isinstance(now, SANLayer) and child.training != parent.training:
                child.train(parent.training)  # model.eval() did not reach it


def _fits(tensor: Tensor | None, value: Tensor | None) -> bool:
    """Whether the value can be written into the tensor, which so stays the model's own."""
    both = tensor is not None and value is not None
    return both and tensor.shape == value.shape and not tensor.is_inference()


@torch.inference_mode(False)
@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor | None]) -> None:
    """Write values into parameters and buffers; one that does not fit is put in their place."""
    _reshard(model)
    torch.clear_autocast_cache()  # it holds what half precision made of the former values
    modules, tensors = _modules(model), _tensors(model)
    for key, value in values.items():
        parent, _, name = key.rpartition(".")
        old, layer = tensors.get(key), modules[parent]
        if _fits(old, value):
            _write(old, value)
        elif name in layer._buffers:
            like = value if old is None else old
            layer._buffers[name] = value if value is None else value.to(like, copy=True)
        else:
            if not isinstance(value, nn.Parameter):  # else it comes back from `disabled`
                value = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
            chains = getattr(layer, "parametrizations", {})  # of what trains in float32
            holder, own = (chains[name], "original") if name in chains else (layer, name)
            holder._parameters[own] = value
            size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
            setattr(layer, size, len(value))


@torch.inference_mode(False)
def _forget(model: nn.Module) -> None:
    """No trace of SAN: what trained in float32 is rounded to its own type, flags are as before."""
    required_grad = model._san.required_grad
    place = {key: i for i, key in enumerate(required_grad)}
    for prefix, module in _modules(model).items():
        for name, chain in [*getattr(module, "parametrizations", {}).items()]:
            if isinstance(chain[0], _Rounded):
                value, kind = getattr(module, name).detach(), type(module)
                # deep copies share the class that torch made, and would lose the weight with it
                module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                module._parameters[name] = nn.Parameter(value)
                own = module._parameters
                at = {k: place.get(_plain(f"{prefix}.{k}"), len(place)) for k in own}
                for key in sorted(at, key=at.get):  # an optimizer's state goes by the order
                    own[key] = own.pop(key)
    _drop_hook(model)
    del model._san
    for key, tensor in _tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(required_grad.get(key, tensor.requires_grad))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes the base model's output; afterwards the adapted one's again.

    Run a backward pass on the side where its forward pass ran: torch refuses the other one, as
    "modified by an inplace operation", but does not see it where FSDP2 has sharded.
    Raises ValueError for a model without SAN layers, and where `detach` would.
    """
    model = _unwrapped(model)
    if hasattr(model, "_san") and model._san.disabled:  # inside another `disabled`
        yield
        return
    _adapted(model)
    _require_remembered(model)
    attached = model._san
    adapted = [(p, name, p._modules.get(name), p.training) for _, p, name, _ in attached.children]
    trained, versions = {}, ExitStack()  # torch tells by a version what a backward pass may read
    try:
        attached.disabled = True
        _put_base_layers(model)
        tensors = _tensors(model)
        for key, value in attached.values.items():
            trained[key] = tensor = tensors.get(key)
            if _fits(tensor, value):
                trained[key] = tensor.detach().clone()
                versions.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
                for _ in range(9):  # further than the next steps bring it, so that torch sees it
                    torch.autograd.graph.increment_version(tensor)
        _put(model, attached.values)
        yield
    finally:
        _put(model, trained)
        versions.close()
        for parent, name, child, training in adapted:
            if child not in (None, parent._modules.get(name)) and parent.training != training:
                child.train(parent.training)  # model.eval() did not reach it
            parent._modules[name] = child
        attached.disabled = False


# ---------------------------------------------------------------------------- files and figures


def write(content: Any, path: str | os.PathLike, save: Callable | None = None) -> None:
    """save(content, file), torch.save by default, to a temporary file that is then renamed.

    The file is whole or as it was, also when the power fails. Raises OSError if it cannot be
    written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (save or _save)(content, temporary)
        with open(temporary, "rb+") as file:  # on the disk before its name is
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.exists():
            temporary.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # a full disk is a RuntimeError to torch
            told = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"could not write {path}: {str(told).splitlines()[0]}") from error
        raise


def _save(content: Any, path: Path) -> None:
    with open(path, "wb") as file:  # its errors are raised; torch 2.6's own file may hide them
        torch.save(content, file)


def read(path: str | os.PathLike) -> Any:
    """torch.load of tensors and plain values onto the CPU; code in the file is never executed.

    Raises FileNotFoundError if it is missing, OSError if it is broken or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise zipfile.BadZipFile  # torch would take its changed bytes for numbers
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise OSError(f"could not read {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise OSError(f"{path} is refused: it is no file of tensors and plain values") from error
    except Exception as error:  # torch's unpickler raises almost anything on broken bytes
        raise OSError(f"{path} is broken or no torch file; make or fetch it again") from error


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write all that differs from the base model, with the links and settings.

    That is γ and β, what requires a gradient or was named in `trainable`, what was put in place of
    a module of the base or given other values since, and every buffer that changed (BatchNorm's
    statistics). Of what is frozen up to sixteen entries are compared, and a change of others alone
    goes unnoticed: name in `trainable` what you change by hand.

    Raises ValueError for a model without SAN layers or with them disabled, and for a value that is
    not finite; OSError if it cannot be written.
    """
    write(adapter_of(model), path)


def adapter_of(model: nn.Module) -> dict[str, Any]:
    """What `save_adapter` writes. Of processes that share a model all call it, and one writes."""
    model, layers = _adapted(model)
    _look_again(model, layers)
    different = _different(model)
    whole = {id(v): _whole(v.detach()).clone() for v in different.values()}  # what is tied, once
    values = {key: whole[id(v)] for key, v in different.items()}
    for key, value in values.items():
        _require_finite(f"'{key}'", value)
    attached = model._san
    lost = _replaced(model)
    frozen = {k: shape for k, shape in attached.shapes.items() if k not in values}
    frozen = {k: shape for k, shape in frozen.items() if not k.startswith(lost)}
    content = {"san": _FORMAT, "links": [tuple(link) for link in attached.links]}
    content |= {"settings": attached.settings, "values": values, "frozen": frozen}
    content["samples"] = {key: attached.samples[key] for key in frozen}
    return content


def is_dense(value: Any) -> bool:
    """Whether it is a tensor of real numbers, each of which has its own place in memory."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return plain and not (value.is_complex() or value.is_quantized)


_FORMAT = 3  # of adapter files, and what they hold
_HOLDS = {
    "links": (list, lambda link: isinstance(link, tuple) and len(link) == 3),
    "settings": (dict, lambda value: isinstance(value, bool)),
    "values": (dict, is_dense),
    "frozen": (dict, lambda shape: isinstance(shape, list) and {*map(type, shape)} <= {int}),
    "samples": (dict, is_dense),
}


def _different(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of all that may differ from the base model's."""
    attached, found = model._san, {}
    inside = tuple(f"{link.layer}.layer." for link in attached.links)
    new, own = _replaced(model), {*attached.trainable, *_gammas_and_betas(model)}
    for key, tensor in _tensors(model, saved=True).items():
        if key.startswith(inside):
            changed = _changed(model, key, tensor)
            if tensor.requires_grad or changed:
                what = "has other values than at attach" if changed else "requires a gradient"
                raise ValueError(
                    f"'{key}' {what}, but the layer that SAN adapts is frozen; what is trained "
                    "inside it cannot be kept in an adapter"
                )
            continue
        if key in own or tensor.requires_grad or key.startswith(new):
            changed = True
        elif isinstance(tensor, nn.Parameter):
            changed = _changed(model, key, tensor)
        else:  # a buffer, kept whole
            base = attached.values.get(key)
            changed = base is None or not torch.equal(tensor, base.to(tensor))
        if changed:
            found[key] = tensor
    return found


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Attach what `save_adapter` wrote to a fresh base model, on its device and in its dtype.

    What is frozen decides whether the file fits: its names, shapes and up to sixteen entries of
    each, within half precision's rounding. A model that was merged already is refused by them,
    unless γ moved no more than that rounding. A linear layer or convolution that was trained, as a
    new head, takes the file's shape; a head of another kind has to be put in place first. Raises
    ValueError, and leaves the model as it was, if the file belongs to another base model (naming
    what differs first), has values that are not finite or is no adapter; OSError if it is
    unreadable.
    """
    content = read_adapter(path)
    model = _unwrapped(model, ddp=False)
    if place := _where_attached(model):
        raise ValueError(f"{place} has SAN layers already; load onto a fresh base model")
    links, values, own = content["links"], content["values"], _tensors(model, saved=True)
    try:
        added = {f"{layer}.{name}" for layer, *_ in links for name in ("gamma", "beta")}
        of_base = {key: value for key, value in values.items() if key not in added}
        _check_base(path, content["frozen"], of_base, model)
        for layer, *_ in links:
            _require_values(f"{layer}.weight", own[f"{layer}.weight"])
        _check_samples(path, {key: content["samples"][key] for key in content["frozen"]}, own)
        trained = [key for key in of_base if isinstance(own[key], nn.Parameter)]
        attach(model, links, **content["settings"], trainable=trained)
        here = {k: v for k, v in _tensors(model).items() if k in added}
        if _shapes(here) != _shapes({k: v for k, v in values.items() if k in added}):
            raise ValueError(f"{path} is a broken adapter: its values do not fit its own links")
        _put(model, values)
    except Exception as error:  # torch's own are no closed list
        if hasattr(model, "_san"):
            detach(model)
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        refused = isinstance(error, ValueError | TypeError)  # by attach
        fault = "cannot be loaded onto this model" if refused else "is a broken adapter"
        said = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{path} {fault}: {said}") from error


def read_adapter(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_adapter` wrote, by the names of _HOLDS. Raises as `load_adapter`."""
    content = read(path)
    if not isinstance(content, dict) or repr(content.get("san")) != repr(_FORMAT):
        raise ValueError(f"{path} is not an adapter that this san.py wrote")
    for name, (kind, fits) in _HOLDS.items():
        entry = content.get(name)
        values = entry.values() if isinstance(entry, dict) else entry
        if not (isinstance(entry, kind) and all(map(fits, values))):
            raise ValueError(f"{path} is a broken adapter: its {name} are not what they must be")
    for key, value in content["values"].items():
        _require_finite(f"{path} is broken: '{key}'", value)
    return content


def _check_base(path: Any, frozen: dict, values: dict, model: nn.Module) -> None:
    """Raise ValueError if the base model is another one than the file was trained on.

    A trained layer may have another number of outputs: a new head has the file's.
    """
    modules = _modules(model)
    there, here = frozen | _shapes(values), _shapes(_tensors(model, saved=True))

    def fits(key: str) -> bool:
        if there.get(key) == here.get(key):
            return True
        is_layer = isinstance(modules.get(key.rpartition(".")[0]), _KNOWN)
        return key in values and key in here and is_layer and there[key][1:] == here[key][1:]

    differ = [
        f"{key} ({there.get(key, 'missing')} there, {here.get(key, 'missing')} here)"
        for key in dict.fromkeys([*there, *here])
        if not fits(key)
    ]
    if differ:
        raise ValueError(f"{path} was trained on another base model: {'; '.join(differ[:3])}")


def _check_samples(path: Any, samples: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError if what is frozen has other values, whatever either was rounded to."""
    for key, there in samples.items():
        here = _sample(own[key])
        if not _same(there, here):
            at = (here - there).abs().argmax()
            raise ValueError(
                f"{path} was trained on other weights of this architecture: {key} has "
                f"{there[at]:.3g} there and {here[at]:.3g} here; load the same base first, unmerged"
            )


def summary(model: nn.Module) -> dict[str, Any]:
    """Counts of the adapted model's parameters, and what each layer's γ has become.

    trainable, total: numbers of parameters; percent: 100 · trainable / total;
    layers: name → share of channels potentiated (γ > 1, long-term potentiation [P]) and depressed
    (γ < 1, long-term depression [P]), each 0 … 1, and γ's min and max.
    """
    model, layers = _adapted(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    figures = {}
    for name, layer in layers.items():
        if (gamma := _whole(layer.gamma)) is not None:
            figures[name] = {
                "potentiated": (gamma > 1).float().mean().item(),
                "depressed": (gamma < 1).float().mean().item(),
                "min": gamma.min().item(),
                "max": gamma.max().item(),
            }
    percent = 100 * trainable / total
    return {"trainable": trainable, "total": total, "percent": percent, "layers": figures}
