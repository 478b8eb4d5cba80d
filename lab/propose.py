"""The links of a model nobody has seen, found by asking the model instead of reading it.

    proposals = propose(model, example)
    print(to_python(proposals))
    san.attach(model, [p.link for p in proposals])

The idea: γ multiplies the output channels of a layer A, so multiply channel c by 1 + ε s_c with a
code s of signs, one per channel, and see how the input x of a later layer B moves. An input j that
carries channel c moves along s_c, code after code, through an activation, a norm, attention or a
residual sum alike; what is common to all channels, such as a norm's variance, cancels among the
signs. With K codes s¹ … s^K, the movements Δ_j^k = x_j(s^k) − x_j being vectors over places,

    share(c, j) = ‖ 1/K Σ_k s_c^k Δ_j^k ‖²  /  1/K Σ_k ‖ Δ_j^k ‖²

is near 1 where j carries c alone. By chance it is 1/K, and at most about ln C / K for the luckiest
of C channels; with K = 4 ln C codes that is 1/4. The best c for each j is the link's index: a
slice, a repeat, a permutation, a flatten. The anterior of B is the latest layer that explains all
of B's inputs, with shares of 1/4 at least and 2/3 on average.

A link is exact if γ passes through as it is, x_j(γ) = γ_c x_j, tried with γ from 1/8 to 8 on the
channels of the index: attention's values, a ReLU, the linear side of a gate. Otherwise it goes
through a nonlinearity or norm. Two things count for more than being latest. A gate may be called
after what it gates, silu(g) ⊙ u: of two layers that stand side by side, an exact one wins. And a
layer that writes one number per channel for all places modulates (squeeze and excite, a time
embedding): it gives way to one that writes every place.

The values of the parameters only stand in the way: dead and zero channels, outliers, sharp
attention. So the question goes to a float64 copy whose parameters are drawn anew and whose layers'
outputs are brought to mean 0 and size 1. A's own output is noise, ± (1 + n/4) with n normal and one
sign per channel, then its negative, which passes a ReLU that hides the one.

Where this fails. A layer that reads several layers' channels side by side (DenseNet, U-Net) has no
single anterior, and gets none. A layer whose parent reads its weight and never calls it
(nn.MultiheadAttention, torchvision's Swin) is not seen: what it writes to gets an earlier anterior,
through the residual sum, or none, or what modulates whole heads, such as a position bias. Where two
layers write to one sum, as a ResNet's last convolution and its shortcut do, the one called later is
taken. With fewer than about 8 channels a norm hides which is which.

All of it is our choice [us].
"""

import argparse
import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from san import Link

STEP = 1e-3  # ε, far above the rounding of norms that compute in float32 whatever they get
DIRECTIONS = 8  # a movement is kept as its projections on so many random directions
PATIENCE = 12  # layers that move an input and do not explain it, before the search is given up


class Proposal(NamedTuple):
    """A link, and how γ gets from its anterior to the layer.

    kind: "exact", "through" (a nonlinearity or norm) or "none" (no anterior found).
    share: the least explained share among the layer's inputs, 0 … 1; for "none" the best layer's.
    reason: for "none", what was seen instead.
    """

    link: Link
    kind: str
    share: float
    reason: str = ""


def propose(
    model: nn.Module, example: Any, skip: str | Iterable[str] | None = None, redraw: bool = True
) -> list[Proposal]:
    """One proposal per linear or convolutional layer that the example calls, in that order.

    example: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. One picture
    or text will do. Floats become float64, whole numbers stay.
    skip: layers, or modules that hold them, to leave out; None leaves out the head: each layer
    whose output the model returns as it is. () leaves out nothing.
    redraw: False keeps the model's own parameters, for a model that random ones would break.

    `model` stays as it was. Takes the memory of a float64 copy and of all outputs within it.
    Warns of layers left out: never called, tied, or of another kind. Raises ValueError if `skip`
    names nothing, if values are not finite or decide what is called, or if no layer is left.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = _Probe(copy.deepcopy(model).double().eval(), example, redraw)
        order = _chosen(model, probe, skip)
        found, index, nearest = {}, {}, {}
        # 3 nothing found, 2 what modulates, 1 through (a layer beside it may be exact), 0 settled
        state, tried = dict.fromkeys(order, 3), Counter()
        for i in reversed(range(len(order) - 1)):
            anterior, later = order[i], [b for b in order[i + 1 :] if state[b]]
            writers = {b: found[b].link.anterior for b in later if state[b] == 1}
            moved = probe.moved(anterior, {*later, *writers.values()})
            for b, writer in writers.items():
                if writer in moved:  # it reads this layer, so that they are not side by side
                    state[b] = 0
                elif b in moved and probe.proportional(anterior, b, index[b]).all():
                    state[b] = 2
            watch = [b for b in later if b in moved and state[b] > 1]
            for b, share, channels, exact in probe.explain(anterior, watch):
                least = share.min().item()
                nearest[b] = max(nearest.get(b, (0.0, "")), (least, anterior))
                new = 2 if probe.modulates(anterior, b) else int(not exact)
                if new < state[b] and (exact or least >= 1 / 4 and share.mean() >= 2 / 3):
                    state[b], index[b] = new, channels
                    own = channels[: len(channels) // len(probe.calls[b])].tolist()
                    whole = own == [*range(probe.channels(anterior))]
                    link = Link(b, anterior, None if whole else own)
                    found[b] = Proposal(link, "exact" if exact else "through", least)
                tried[b] += 1
                if tried[b] == PATIENCE:
                    state[b] = 0
    return [found[b] if b in found else _none(b, *nearest.get(b, (0.0, ""))) for b in order]


def _none(layer: str, share: float, anterior: str) -> Proposal:
    reason = "no earlier layer moves its input"
    if anterior:
        reason = f"no layer explains all of its inputs, '{anterior}' the most"
    return Proposal(Link(layer), "none", share, reason)


def _chosen(model: nn.Module, probe: "_Probe", skip: str | Iterable[str] | None) -> list[str]:
    """The layers to link, as they are first called; a warning for those that cannot be linked."""
    modules = dict(model.named_modules())
    skip = probe.heads if skip is None else [skip] if isinstance(skip, str) else [*skip]
    for name in skip:
        if name not in modules:
            raise ValueError(f"there is no layer or module '{name}' to skip")
    kept = {n: m for n, m in modules.items() if not any(f"{n}.".startswith(f"{s}.") for s in skip)}
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = {n for n, m in kept.items() if any(users[id(p)] > 1 for p in m.parameters())}
    other = [
        f"{n}, {type(m).__name__}"
        for n, m in kept.items()
        if not (n in probe.axis or isinstance(m, nn.Embedding) or [*m.children()])
        and any(p.ndim > 1 for p in m.parameters())
    ]
    for names, why in (
        (
            [n for n in kept if n in probe.axis and n not in probe.calls],
            "never called, or its parent reads its weight",
        ),
        ([n for n in kept if n in probe.calls and n in tied], "its weight is another's as well"),
        (other, "of a kind that is not linked"),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"left out ({why}): {names[0]}{more}", stacklevel=3)
    order = [n for n in probe.calls if n in kept and n not in tied]
    if not order:
        raise ValueError("the example calls no linear or convolutional layer that can be linked")
    return order


# ---------------------------------------------------------------------------- asking the model


def _channel_axis(module: nn.Module) -> int | None:
    """Where a layer's channels stand, counted from behind; None for what cannot be linked."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 1 - module.weight.ndim
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers'
    return -1 if linear else None


def _float64(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {key: _float64(value) for key, value in x.items()}
    return type(x)(map(_float64, x)) if isinstance(x, (list, tuple)) else x


class _Enough(BaseException):  # no Exception, which a model may catch
    """Ends a pass: the last layer in question has its input."""


class _Probe:
    """A copy of the model whose passes are bent at one layer and watched at others.

    Calls of modules are numbered as they begin. The first pass records each one's output and the
    number after its last part, so that what is over before the bent layer begins is given out
    again, not computed; and a pass ends with the last input that is watched.

    Shapes: C output channels of the bent layer; of an input that is watched, P places, all axes
    but the channels', and J channels, those of a layer's several calls side by side.
    """

    def __init__(self, model: nn.Module, example: Any, redraw: bool):
        self.model, self.redraw = model, redraw
        self.generator = torch.Generator().manual_seed(0)
        if redraw:
            self._redraw()
        example = _float64(example)
        self.kwargs = example if isinstance(example, dict) else {}
        self.args = () if self.kwargs else example if isinstance(example, tuple) else (example,)
        self.axis = {n: axis for n, m in model.named_modules() if (axis := _channel_axis(m))}
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        self.calls: dict[str, list[int]] = {}  # the numbers of each layer's calls
        self.shapes: dict[str, torch.Size] = {}  # of its output
        self.places: dict[str, int] = {}  # of its input
        self.record: dict[int, tuple[int, Tensor]] = {}
        self.directions: dict[int, Tensor] = {}
        self.bent, self.start, self.watch = None, 0, ()
        for name, module in model.named_modules():
            if name:
                module.forward = self._wrapped(name, module.forward)
        self.outputs: dict[str, Tensor] = {}  # alive until the model's own is compared with them
        result = self._pass()
        result = [*result.values()] if isinstance(result, Mapping) else result
        returned = result if isinstance(result, (list, tuple)) else [result]
        memory = [x.untyped_storage().data_ptr() for x in returned if isinstance(x, Tensor)]
        outputs = {n: x.untyped_storage().data_ptr() for n, x in self.outputs.items()}
        self.heads = [n for n, pointer in outputs.items() if pointer in memory]
        del self.outputs

    def _redraw(self) -> None:
        """Matrices of variance 1 / inputs; norms, biases and layer scales between 1/2 and 3/2."""
        for p in self.model.parameters():
            if p.ndim > 1:
                p.copy_(self._normal(p.shape) * (len(p) / p.numel()) ** 0.5)
            else:
                p.copy_(0.5 + torch.rand(p.shape, generator=self.generator))
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _wrapped(self, name: str, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = self.now
            if number in self.record and self.record[number][0] <= self.start:
                self.now, output = self.record[number]
                return output.clone()  # what follows may write into it
            self.now += 1
            if name in self.watch:
                self._see(name, args[0] if args else next(iter(kwargs.values())))
                if number == self.last:
                    raise _Enough
            output = forward(*args, **kwargs)
            if name in self.axis:
                output = self._answer(name, number, output.movedim(self.axis[name], -1))
                output = output.movedim(-1, self.axis[name])
            if self.bent is None and isinstance(output, Tensor):
                self.record[number] = self.now, output.clone()
                if name in self.axis:
                    self.calls.setdefault(name, []).append(number)
                    self.outputs[name], self.shapes[name] = output, output.shape
            return output

        return call

    def _see(self, name: str, x: Tensor) -> None:
        x = x.movedim(self.axis[name], -1).flatten(0, -2)  # P×J
        if not x.isfinite().all():
            raise ValueError(
                f"the input of layer '{name}' is not finite; if the model takes no random "
                "parameters, give redraw=False"
            )
        self.places[name] = len(x)
        self.inputs.setdefault(name, []).append(x.clone())

    def _answer(self, name: str, number: int, z: Tensor) -> Tensor:
        """A layer's output, …×C: noise ⊙ factors where it is bent, else of mean 0 and size 1."""
        if name == self.bent:
            if number not in self.noise:
                signs = self._normal(z.shape[-1:]).sign()
                self.noise[number] = (signs * (1 + self._normal(z.shape) / 4)).to(z)
            return self.noise[number] * self.factors.to(z)
        if not self.redraw:
            return z
        if name not in self.scales:
            mean, rms = z.flatten(0, -2).mean(0), z.square().mean().sqrt()
            std = (z - mean).square().mean().sqrt()
            varies = std > rms / 10  # else one place, or all places much alike
            self.scales[name] = mean * varies, std if varies else rms
        mean, size = self.scales[name]
        return (z - mean) / size

    def _pass(self) -> Any:
        self.now, self.inputs = 0, {}
        torch.default_generator.manual_seed(0)  # what the model draws is the same in every pass
        try:
            return self.model(*self.args, **self.kwargs)
        except _Enough:
            return None

    def bend(self, layer: str, factors: Tensor, watch: Iterable[str]) -> dict[str, list[Tensor]]:
        """The inputs of the watched layers, per call, when `layer` puts out ± noise ⊙ factors.

        2P×J: those for the noise, then those for its negative.
        """
        if layer != self.bent:
            self.bent, self.start, self.noise = layer, self.calls[layer][0], {}
        self.watch, self.last = watch, max(self.calls[name][-1] for name in watch)
        halves = []
        for sign in (1, -1):
            self.factors = sign * factors
            self._pass()
            for b in watch:
                if len(self.inputs.get(b, ())) != len(self.calls[b]):
                    raise ValueError(f"whether '{b}' is called hangs on values; give it to `skip`")
            halves.append(self.inputs)
        return {b: [torch.cat(xs) for xs in zip(halves[0][b], halves[1][b])] for b in watch}

    def channels(self, layer: str) -> int:
        return self.shapes[layer][self.axis[layer]]

    def modulates(self, layer: str, b: str) -> bool:
        """Whether `layer` writes one number per channel and example where b reads many places."""
        shape = self.shapes[layer]
        return shape.numel() == shape[0] * self.channels(layer) and self.places[b] > shape[0]

    def moved(self, layer: str, watch: Iterable[str]) -> set[str]:
        """Those of `watch` whose input moves at all with the γ of `layer`."""
        if not watch:
            return set()
        code = 1 + STEP * self._normal([self.channels(layer)]).sign()
        before, after = (self.bend(layer, f, watch) for f in (torch.ones_like(code), code))
        return {b for b in after if any(not x.equal(y) for x, y in zip(before[b], after[b]))}

    def explain(
        self, layer: str, watch: Sequence[str], times: int = 1
    ) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
        """For each watched layer: its name, shares, J, their channels, J, and whether it is exact.

        A share is 0 where the channels of several calls differ. Where most is explained but little
        of one input, that one is in doubt, and is asked with four times the codes.
        """
        if not watch:
            return
        codes = _codes(self.channels(layer), times, self.generator)
        base = self._projected(layer, torch.ones_like(codes[0]), watch)
        moved = [self._projected(layer, 1 + STEP * code, watch) for code in codes]
        codes = codes.float()
        for b in watch:
            moves = torch.stack([(x[b] - base[b]) / STEP for x in moved]).float()  # K×DIRECTIONS×J
            share, channels = _explained(codes, moves)
            calls = channels.unflatten(0, (len(self.calls[b]), -1))
            share = share * (calls == calls[0]).all(0).repeat(len(calls))
            if times == 1 and share.mean() >= 2 / 3 and share.min() < 1 / 2:
                yield from self.explain(layer, [b], times=4)
                continue
            tries = [channels] if share.min() > 1 / 10 else []
            if tries and share.mean() < 9 / 10:
                own = codes[:, None, channels]
                rest, other = _explained(codes, moves - own * (moves * own).mean(0))
                if rest.min() > 1 / 2:  # two channels together: silu(g) ⊙ u, both from this layer
                    low, high = channels.minimum(other), channels.maximum(other)
                    tries.insert(0, low.where(self.proportional(layer, b, low), high))
            exact = [t for t in tries if self.proportional(layer, b, t).all()]
            yield b, share, exact[0] if exact else channels, bool(exact)

    def _projected(self, layer: str, factors: Tensor, watch: Sequence[str]) -> dict[str, Tensor]:
        """As `bend`, but DIRECTIONS×J."""
        projected = {}
        for name, inputs in self.bend(layer, factors, watch).items():
            for x in inputs:
                if len(x) not in self.directions:
                    self.directions[len(x)] = self._normal((DIRECTIONS, len(x))).to(x)
            projected[name] = torch.cat([self.directions[len(x)] @ x for x in inputs], 1).cpu()
        return projected

    def proportional(self, layer: str, b: str, index: Tensor) -> Tensor:
        """Whether x_j(γ) = γ_index[j] x_j, J, for γ from 1/8 to 8 on the channels of the index."""
        ones = torch.ones(self.channels(layer), dtype=torch.float64)
        if index.max() >= len(ones):
            return torch.tensor([False])
        gamma = ones.clone()
        gamma[index] = 8 ** (2 * torch.rand(len(index), generator=self.generator).double() - 1)
        before, after = (self.bend(layer, f, [b])[b] for f in (ones, gamma))
        right = []
        for x, y, i in zip(before, after, index.chunk(len(before))):
            x = x * gamma[i].to(x)
            right.append((y - x).abs().amax(0) <= 1e-5 * x.abs().amax(0))
        return torch.cat(right).cpu()


def _codes(channels: int, times: int, generator: torch.Generator) -> Tensor:
    """times 4 ln C codes for C channels, at least 16, K×C: different rows of a Hadamard matrix.

    Its entry (k, c) is −1 to the number of ones that k and c share in binary. Such codes are less
    alike than random ones; those of up to 16 channels are orthogonal.
    """
    bits = torch.arange(max(1, (channels - 1).bit_length()))
    count = min(2 ** len(bits), times * max(16, math.ceil(4 * math.log(channels))))
    k = torch.randperm(2 ** len(bits), generator=generator)[:count]
    ones = k[:, None, None] >> bits & torch.arange(channels)[:, None] >> bits & 1
    return 1 - 2 * (ones.sum(-1) % 2).double()


def _explained(codes: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest share of each input, J, and its channel, J; codes K×C, moves K×DIRECTIONS×J.

    An input that never moves has share 0.
    """
    best = []
    total = moves.square().mean(0).sum(0).clamp(min=1e-30)
    for part in torch.arange(len(total)).split(max(1, 2**20 // codes.shape[1])):  # for memory
        means = torch.einsum("kc,kdj->cdj", codes, moves[..., part]) / len(codes)
        best.append((means.square().sum(1) / total[part]).max(0))
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


# ------------------------------------------------------------------------------------- writing


def to_python(proposals: Iterable[Proposal]) -> str:
    """Python to paste: the list of links, and of each how γ gets there, as a comment."""
    lines = []
    for (layer, anterior, index), kind, share, reason in proposals:
        words = [f'"{layer}"'] + [f'"{anterior}"'] * (anterior is not None)
        words += [written(index)] if index is not None else []
        about = f"none found: {reason}" if kind == "none" else f"{kind}, share {share:.2f}"
        lines.append(f"    Link({', '.join(words)}),  # {about}\n")
    return f"from san import Link\n\nlinks = [\n{''.join(lines)}]"


def written(index: Sequence[int]) -> str:
    """An index as a short expression: a range, ranges within ranges, or else the list itself.

    The innermost range is the longest run of equal steps of which the index consists; the first
    numbers of all runs are then an index to be written in the same way.
    """
    loops, rest = [], [*index]
    while len(rest) > 1:
        step = rest[1] - rest[0]
        steps = [y - x for x, y in zip(rest, rest[1:])]
        for length in range(len(rest), 1, -1):
            inside = (s for i, s in enumerate(steps, 1) if i % length)
            if len(rest) % length == 0 and all(s == step for s in inside):
                break
        else:
            return str([*index])
        loops.insert(0, (length, step))
        rest = rest[::length]
    start, names, words = rest[0], [], []
    for length, step in loops:
        first, start = (start, 0) if step else (0, start)
        numbers = range(first, first + length * (step or 1), step or 1)
        text = str(numbers).replace("(0, ", "(") if numbers.step == 1 else str(numbers)
        if step:
            names.append("abcdefghijklmnopqrstuvwxyz"[len(names)])
        words.append(f"for {names[-1] if step else '_'} in {text}")
    if len(loops) == 1 and names:
        return text
    return f"[{' '.join([' + '.join(names) or str(start), *words])}]"


def built(name: str) -> tuple[nn.Module, Tensor]:
    """The model of that name with random values, and a picture of the size it is made for.

    Raises ValueError for an unknown name, and if the package is not installed.
    """
    package, _, own = name.rpartition(":")
    try:
        if package == "timm":
            import timm

            if timm.is_model(own):
                model = timm.create_model(own)
                return model, torch.randn(1, *model.default_cfg["input_size"])
        if package == "torchvision":
            import torchvision

            if own in torchvision.models.list_models(torchvision.models):
                return torchvision.models.get_model(own), torch.randn(1, 3, 224, 224)
    except ImportError:
        raise ValueError(f"{package} is not installed; pip install {package}") from None
    if not package and own in models.SIZES:
        model = models.build(own, outputs=10)
        return model, torch.randn(1, 3, model.image_size, model.image_size)
    sizes = ", ".join(models.SIZES)
    raise ValueError(f"no model '{name}'; give timm:NAME, torchvision:NAME or one of {sizes}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.propose", description="Print a model's links, found by asking it."
    )
    parser.add_argument("model", help="timm:NAME, torchvision:NAME or a name of models.SIZES")
    try:
        model, picture = built(parser.parse_args().model)
    except ValueError as error:
        parser.error(str(error))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        text = to_python(propose(model, picture))
    print(text, *(f"# {note.message}" for note in notes), sep="\n")


if __name__ == "__main__":
    main()
