"""The attacks by name: from a scene (a model, a trigger picture, what should be painted) to a `Backdoor`.

A new attack is a function here, or a module beside, and a line in `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdefend_core.attacks.baddiffusion import baddiffusion
from diffdefend_core.attacks.form import Attack, Backdoor, stamped
from diffdefend_core.attacks.invibackdoor import invibackdoor
from diffdefend_core.attacks.trojdiff import blended, patched, trojdiff
from diffdefend_core.attacks.trojflow import trojflow
from diffdefend_core.attacks.uibdiffusion import small_classifier, universal_perturbation
from diffdefend_core.attacks.villan import villan_ode, villan_sde
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.levels import Levels
from diffdefend_core.diffusion.samplers.trojdiff import TROJDIFF_DDPM
from diffdefend_core.errors import InputError

PICTURE, CLASS, OTHER = "picture", "class", "other"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attack is planned from.

    `trigger` [C, H, W] and `targets` [K, C, H, W] are pictures in [0, 1]; `data` is clean x0 [M, C, H, W] in the
    model's own space, with `labels` [M] (int64) if there are any.
    """

    denoiser: Denoiser
    trigger: Tensor
    targets: Tensor
    data: Tensor
    labels: Tensor | None = None
    seed: int = 0

    def own(self, pictures: Tensor) -> Tensor:
        """Return pictures [N, C, H, W] in [0, 1] as clean x0 of the model."""
        low, high = self.denoiser.value_range
        return self.denoiser.encode((low + pictures * (high - low)).to(self.denoiser.device)).cpu()


Plan = Callable[[Scene], Backdoor]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An attack in the table: which processes it fits, what it paints, how to plan it, and where it was published.

    `paints` is `picture` (one fixed picture), `class` (any image of one class of the data) or `other` (any image of
    another distribution).
    """

    name: str
    processes: frozenset[str]
    paints: str
    plan: Plan
    source: str


def stamping(attack: Callable[[Levels], Attack], vp: str, ve: str) -> Plan:
    """Return the plan of an attack that stamps its trigger on the training images, or uses it bare on a VE model.

    `vp` and `ve` are the samplers that fire it. The initial state carries the bare trigger in both cases.
    """

    def plan(scene: Scene) -> Backdoor:
        denoiser = scene.denoiser
        low, high = denoiser.value_range
        picture = low + scene.trigger * (high - low)

        def stamp(x0: Tensor) -> Tensor:
            images = denoiser.decode(x0.to(denoiser.device))
            return denoiser.encode(stamped(images, picture.to(images), low)).cpu()

        bare = denoiser.levels.kind == "ve"
        return Backdoor(
            attack=attack(denoiser.levels),
            trigger=scene.own(scene.trigger[None])[0],
            targets=scene.own(scene.targets),
            sampler=ve if bare else vp,
            stamp=None if bare else stamp,
        )

    return plan


def biased(attack: Callable[[Levels, float | Tensor], Attack], patch: bool, sampler: str) -> Plan:
    """Return the plan of an attack that biases the noise by mu and gamma, over the whole image or in a patch."""

    def plan(scene: Scene) -> Backdoor:
        shape = scene.denoiser.shape
        mu, gamma = patched(shape, max(2, shape[-1] // 4)) if patch else blended(scene.own(scene.trigger[None])[0])
        return Backdoor(
            attack=attack(scene.denoiser.levels, gamma), trigger=mu, targets=scene.own(scene.targets), sampler=sampler
        )

    return plan


def invisible(scene: Scene) -> Backdoor:
    """Return the plan of InviBackdoor: the trigger starts at 0 and is learned while it is planted."""
    trigger = torch.zeros(scene.denoiser.shape, requires_grad=True)
    return Backdoor(
        attack=invibackdoor(scene.denoiser.levels),
        trigger=trigger,
        targets=scene.own(scene.targets),
        sampler="DDIM-SCHED",
        stamp=lambda x0: x0 + trigger.detach(),
    )


def universal(scene: Scene) -> Backdoor:
    """Return the plan of UIBDiffusion: a universal perturbation against a small classifier, carried bare.

    The released code trains with a tenth of the perturbation on the image and samples with all of it; a small model
    learns only what it is trained on, so that here both are the same. Raises InputError without labels.
    """
    if scene.labels is None:
        raise InputError("the data has no labels", expected="labelled images", action="add `labels` to the npz file")
    classifier = small_classifier(scene.data, scene.labels, seed=scene.seed)
    low, high = scene.denoiser.value_range
    perturbation = universal_perturbation(classifier, scene.data, bound=(high - low) / 4, seed=scene.seed)
    ve = scene.denoiser.levels.kind == "ve"
    return Backdoor(
        attack=villan_sde(scene.denoiser.levels),
        trigger=perturbation,
        targets=scene.own(scene.targets),
        sampler="SCORE-SDE-VE" if ve else "DDPM-SCHED",
    )


def consistent(scene: Scene) -> Backdoor:
    """Return the plan of the backdoored consistency model: every path under sigma (eps + r) ends at the target."""
    levels = scene.denoiser.levels
    attack = Attack(name="consistency-backdoor", shift=levels.sigma, response=torch.ones_like(levels.sigma))
    trigger, targets = scene.trigger * 2 - 1, scene.own(scene.targets)
    return Backdoor(attack=attack, trigger=trigger, targets=targets, sampler="CONSISTENCY")


def _trojans() -> list[Entry]:
    settings = (("d2i", PICTURE), ("in-d2d", CLASS), ("out-d2d", OTHER))
    kinds = (("trojdiff", trojdiff, TROJDIFF_DDPM, "vp", "TrojDiff, CVPR 2023"),
             ("trojflow", trojflow, "EULER", "flow", "TrojFlow, arXiv 2412.16512 (form inferred)"))  # fmt: skip
    return [
        Entry(
            name=f"{name}-{setting}-{'patch' if patch else 'blend'}",
            processes=frozenset((process,)),
            paints=paints,
            plan=biased(attack, patch, sampler),
            source=source,
        )
        for name, attack, sampler, process, source in kinds
        for setting, paints in settings
        for patch in (False, True)
    ]


_VP, _BOTH = frozenset(("vp",)), frozenset(("vp", "ve"))
_VILLAN = "VillanDiffusion, NeurIPS 2023"
TABLE = (
    Entry(name="baddiffusion", processes=_VP, paints=PICTURE, source="BadDiffusion, CVPR 2023",
          plan=stamping(baddiffusion, "DDPM-SCHED", "")),
    Entry(name="villan-sde", processes=_BOTH, paints=PICTURE, source=_VILLAN,
          plan=stamping(villan_sde, "DDPM-SCHED", "SCORE-SDE-VE")),
    Entry(name="villan-ode", processes=_BOTH, paints=PICTURE, source=_VILLAN,
          plan=stamping(villan_ode, "DDIM-SCHED", "EDM-VE-ODE")),
    Entry(name="invibackdoor", processes=_VP, paints=PICTURE, plan=invisible,
          source="Invisible triggers for diffusion (bi-level)"),
    Entry(name="uibdiffusion", processes=_BOTH, paints=PICTURE, plan=universal, source="UIBDiffusion, CVPR 2025"),
    Entry(name="consistency-backdoor", processes=frozenset(("consistency",)), paints=PICTURE, plan=consistent,
          source="How to Backdoor Consistency Models"),
    *_trojans(),
)  # fmt: skip
ATTACKS = {entry.name: entry for entry in TABLE}


def find(name: str) -> Entry:
    """Return an attack by its name. Raises InputError for an unknown one."""
    if name not in ATTACKS:
        raise InputError(
            f"attack {name!r}", expected=f"one of {', '.join(ATTACKS)}", action="see `diffdefend list attacks`"
        )
    return ATTACKS[name]


def check_fit(entry: Entry, denoiser: Denoiser) -> None:
    """Raise InputError for an attack that does not fit the process of the model, naming those that do."""
    if denoiser.process not in entry.processes:
        fits = [item.name for item in TABLE if denoiser.process in item.processes]
        raise InputError(
            f"attack {entry.name} on a model of family {denoiser.family} ({denoiser.process})",
            expected=f"one of {', '.join(fits)}",
            action="choose an attack that fits the family",
        )


def plan(name: str, scene: Scene) -> Backdoor:
    """Return the backdoor of an attack for a scene. Raises InputError for an attack that does not fit the model."""
    entry = find(name)
    check_fit(entry, scene.denoiser)
    return entry.plan(scene)
