"""The log of one run, to look at while it trains: TensorBoard's, that of Weights & Biases, or both.

A figure stands at its training step, counted from 0. What is logged is our choice.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

import san

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
BINS = 64  # of a histogram


class Log(contextlib.ExitStack):
    """Logs of these kinds in the folder `out`, until it is closed; of no kind, it writes nowhere.

    settings: what is told of the run; resumed: an older log goes on. Raises ValueError where a
    kind's package is not installed, OSError for what cannot be written.
    """

    def __init__(
        self,
        kinds: Iterable[str] = (),
        out: Path = Path(),
        settings: dict | None = None,
        resumed: bool = False,
    ):
        super().__init__()
        self.folder, self.step, self.board, self.run = out / "tensorboard", -1, None, None
        try:
            self.package = {kind: importlib.import_module(PACKAGES[kind]) for kind in kinds}
        except ImportError as error:
            needed = " ".join(kinds)
            raise ValueError(f"--log needs packages: pip install {needed} ({error})") from error
        if wandb := self.package.get("wandb"):
            # each start of a run has a folder, named by its time and then by the run's id
            starts = sorted(out.glob("wandb/*run-*"), key=lambda path: path.name.split("run-")[1])
            own = starts[-1].name.split("-")[-1] if starts and resumed else None
            options = {"project": os.environ.get("WANDB_PROJECT", "san"), "name": out.name}
            options |= {"id": own, "resume": "allow", "config": settings}
            try:
                self.run = wandb.init(dir=out, **options)
            except wandb.Error as error:
                said = str(error).rstrip(".")
                raise OSError(f"--log wandb: {said}; WANDB_MODE=offline needs no login") from error
            # drawn by our step: those that a killed run has made twice lie on each other
            self.run.define_metric("*", step_metric="step")
            self.push(lambda kind, *_: self.run.finish(exit_code=int(kind is not None)))

    def write(
        self, group: str, figures: dict, step: int | None = None, gammas: dict[str, Tensor] = {}
    ) -> None:
        """Those figures that are numbers, as <group>/<name>, and each layer's γ as a histogram.

        group: train, epoch or result. step: by default the one after all that was written before.
        """
        if not self.package:
            return
        self.step = self.step + 1 if step is None else step
        figures = {f"{group}/{k}": v for k, v in figures.items() if isinstance(v, (int, float))}
        vectors = {f"gamma/{layer}": v.detach().float().cpu() for layer, v in gammas.items()}
        if "tensorboard" in self.package:
            with self._writing():
                self._write_to_board(figures, vectors)
        if self.run:
            histogram = self.package["wandb"].Histogram
            shown = {name: histogram(v.tolist(), num_bins=BINS) for name, v in vectors.items()}
            self.run.log({"step": self.step} | figures | shown)

    def _write_to_board(self, figures: dict[str, float], vectors: dict[str, Tensor]) -> None:
        if not self.board:  # it drops what a killed run has written from this step on
            open_board = self.package["tensorboard"].SummaryWriter
            self.enter_context(_quiet())
            self.board = open_board(self.folder, purge_step=self.step)
            self.callback(self._writing()(self.board.close))
        for name, value in figures.items():
            self.board.add_scalar(name, value, self.step)
        for name, vector in vectors.items():  # the default's bins are as wide as γ / 10
            self.board.add_histogram(name, vector, self.step, bins=BINS)
        self.board.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"could not write {self.folder}: {error.strerror}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TensorBoard's thread does not print what it raises: it is raised in ours as well."""
    hook = threading.excepthook

    def others(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard"):
            hook(failed)

    threading.excepthook = others
    try:
        yield
    finally:
        threading.excepthook = hook


def gammas(model: nn.Module) -> dict[str, Tensor]:
    """Layer → its γ, of every SAN layer that has one."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, san.SANLayer))
    return {name: layer.gamma for name, layer in layers if layer.gamma is not None}


NOWHERE = Log()
