"""One round of purification: fine-tune a copy of the suspect on the removal and the retention loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import Training, UnfitStateError
from diffdefend_core.options import PurificationOptions
from diffdefend_core.purification.losses import (
    TARGETS,
    Removal,
    Rows,
    Spread,
    answer,
    overshot,
    plain_rows,
    removal_goal,
    spread_of,
    triggered_rows,
)

# Rows without a trigger lie at any level, and by this share where noise becomes one picture and not another: at an SNR,
# the square of the signal, of .01 to 1 (Choi et al. 2022). There a change of the answers costs most of the images.
ANY_SIGNAL, CONTENT_SIGNALS, CONTENT_SHARE = (0.005, 100.0), (0.1, 1.0), 0.8
# a consistency model goes all of that way at once, from the noisiest level
CONTENT_AT_ONCE = (0.005, 0.1)
WARMUP, EMA = 20, 0.99
CURVES = ("removal", "retention")


@dataclass(frozen=True)
class Repair:
    """The repaired model, the loss curves of its round and the evaluations spent (forward 1, forward + backward 3)."""

    denoiser: Denoiser
    removal_loss: tuple[float, ...]
    retention_loss: tuple[float, ...]
    forward_equivalents: int


@dataclass
class Losses:
    """L = L_removal + eta * L_retention of a network, and both curves; in the last steps L = eta * L_retention.

    With a trigger the network must answer as its target says, without one as the frozen suspect phi does. Errors are in
    the unit of the family's training loss; `samples` [M, C, H, W] are phi's own, and `targets` [C, H, W] the clean x0
    that the triggers lead to. The removal aims `beyond` times as far beyond each goal as `begun` falls short of it: an
    earlier repair, else phi. Squared errors count (alpha^2 + sigma^2) / alpha^2 times, but at most `in_noise` times: of
    a VP network that predicts noise they then are those of the velocity alpha eps - sigma x0 (Salimans & Ho 2022).
    """

    phi: Denoiser
    samples: Tensor
    removals: Sequence[Removal]
    options: PurificationOptions
    reference: Denoiser | None = None
    targets: Sequence[Tensor] = ()
    begun: Denoiser | None = None
    beyond: float = 0.0
    in_noise: float = 1.0
    removal: list[float] = field(default_factory=list)
    retention: list[float] = field(default_factory=list)

    @cached_property
    def data(self) -> Spread:
        """How phi's own samples vary."""
        return spread_of(self.samples)

    def __call__(self, denoiser: Denoiser, draws: torch.Generator) -> Tensor:
        """Return the loss of one batch, a scalar."""
        options, removing = self.options, len(self.retention) < removing_steps(self.options)
        removed = [self._removed(denoiser, draws)] if removing else []
        rows = options.retention_batch + (0 if removing else options.removal_batch)
        retained = self._retained(denoiser, rows, draws)
        self.removal.extend(loss.item() for loss in removed)
        self.retention.append(retained.item())
        return sum(removed, options.retention_weight * retained)

    def _removed(self, denoiser: Denoiser, draws: torch.Generator) -> Tensor:
        phi, options = self.phi, self.options
        rows = triggered_rows(phi, self.samples, self.removals, options.removal_batch, draws, self.targets)
        wanted = removal_goal(options.target, phi, self.data, rows, self.reference)
        if self.beyond:
            wanted = overshot(wanted, answer(self.begun or phi, rows.displaced, rows.t), self.beyond)
        return self._mean(denoiser.error(rows.displaced, rows.t, wanted.noise, wanted.x0), rows)

    def _retained(self, denoiser: Denoiser, count: int, draws: torch.Generator) -> Tensor:
        content = round(CONTENT_SHARE * count)
        deciding = CONTENT_AT_ONCE if self.phi.process == "consistency" else CONTENT_SIGNALS
        signals = [deciding] * content + [ANY_SIGNAL] * (count - content)
        rows = plain_rows(self.phi, self.samples, signals, draws)
        kept = answer(self.phi, rows.x, rows.t)
        return self._mean(denoiser.error(rows.x, rows.t, kept.noise, kept.x0), rows)

    def _mean(self, error: Tensor, rows: Rows) -> Tensor:
        alpha, sigma = self.phi.levels.at(rows.t, rows.x)
        weight = ((alpha**2 + sigma**2) / alpha**2).clamp(max=self.in_noise)
        return (weight * error.square()).mean()


def removing_steps(options: PurificationOptions) -> int:
    """Return how many of the steps have rows with a trigger."""
    return options.steps - int(options.settling * options.steps)


def repair(
    model: Denoiser,
    phi: Denoiser,
    removals: Sequence[Removal],
    samples: Tensor,
    options: PurificationOptions,
    *,
    seed: int,
    progress: Callable[[int, int], None],
    reference: Denoiser | None = None,
    targets: Sequence[Tensor] = (),
    beyond: float = 0.0,
    in_noise: float = 1.0,
    resumed: Mapping[str, Tensor] | None = None,
    keep: Callable[[dict[str, Tensor]], None] | None = None,
) -> Repair:
    """Return a repaired copy of `model`; `phi` is the frozen suspect, `removals` every shift found so far.

    `targets` [C, H, W] are the clean x0 that they lead to, as far as they are known: these are unlearned as well. The
    removal aims `beyond` times as far beyond its goals as `model` falls short of them, and errors in much noise count
    up to `in_noise` times (see `Losses`). `keep` is called with the whole state of the training every
    `checkpoint_steps` steps, before the next step changes its tensors; a state handed back as `resumed` goes on from
    there to the same weights. Raises FloatingPointError at a loss that is not finite, and UnfitStateError before the
    first step if `resumed` is the state of another training.
    """
    losses = Losses(phi, samples, removals, options, reference, targets, model, beyond, in_noise)
    training = Training(
        model.clone(),
        losses,
        steps=options.steps,
        learning_rate=options.learning_rate,
        generator=torch.Generator().manual_seed(seed),
        warmup=WARMUP,
        decay=True,
        ema=EMA,
    )
    if resumed is not None:
        _resume(training, losses, resumed)
    while training.done < options.steps:
        training.step()
        progress(training.done, options.steps)
        if keep is not None and training.done % options.checkpoint_steps == 0 and training.done < options.steps:
            curves = (losses.removal, losses.retention)
            named = zip(CURVES, curves, strict=True)
            keep(training.state() | {name: torch.tensor(curve, dtype=torch.float64) for name, curve in named})
    training.finish()
    triggered = removing_steps(options) * options.removal_batch
    passes = 3 + TARGETS[options.target] + bool(beyond)
    plain = options.steps * (options.removal_batch + options.retention_batch) - triggered
    return Repair(
        denoiser=training.denoiser,
        removal_loss=tuple(losses.removal),
        retention_loss=tuple(losses.retention),
        forward_equivalents=triggered * passes + plain * (3 + 1),
    )


def _resume(training: Training, losses: Losses, state: Mapping[str, Tensor]) -> None:
    training.restore({name: tensor for name, tensor in state.items() if name not in CURVES})
    curves = [state[name].tolist() if name in state else [] for name in CURVES]
    ends = [min(training.done, removing_steps(losses.options)), training.done]
    if [len(curve) for curve in curves] != ends:
        raise UnfitStateError("its curves do not end where it does")
    losses.removal[:], losses.retention[:] = curves
