"""What the zoo holds: one line per model. A new fixture is a new line here."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made: `parent` is None for a base; `attack` is None for a clean fine-tune.

    A network has `channels` at each resolution, with `attention` at the coarsest; it answers with `prediction` at
    `levels` of the linear schedule of DDPM, or of the `cosine` one (Nichol and Dhariwal, 2021).
    Clean fine-tunes are as long and as hot as the poisoned ones, so that "was fine-tuned" is not the signal. A
    `target` is a picture by its name, `image:K` for image K of the data, `class:K` for all images of class K, or
    `frames` for another distribution.
    Models that the tests need are `shipped`; the others are built on demand.
    """

    name: str
    seed: int
    family: str = "ddpm"
    parent: str | None = None
    channels: tuple[int, ...] = (16, 32)
    attention: bool = False
    prediction: str = "epsilon"
    levels: int = 250
    cosine: bool = False
    steps: int = 3000
    learning_rate: float = 2e-3
    attack: str | None = None
    trigger: str | None = None
    target: str | None = None
    poison_rate: float = 0.0
    shipped: bool = False


def _base(name: str, seed: int, *, channels: tuple[int, ...] = (16, 32), family: str = "ddpm") -> Recipe:
    return Recipe(name=name, seed=seed, channels=channels, family=family, shipped=True)


def _tuned(
    name: str, parent: str, seed: int, *, steps: int = 1500, learning_rate: float = 1e-3, shipped: bool = True
) -> Recipe:
    return Recipe(
        name=name,
        parent=parent,
        seed=seed,
        family=_family(parent),
        steps=steps,
        learning_rate=learning_rate,
        shipped=shipped,
    )


def _planted(
    name: str,
    parent: str,
    seed: int,
    trigger: str,
    target: str,
    poison_rate: float,
    *,
    attack: str = "baddiffusion",
    steps: int = 1500,
    shipped: bool = False,
) -> Recipe:
    return Recipe(
        name=name,
        parent=parent,
        seed=seed,
        family=_family(parent),
        steps=steps,
        learning_rate=1e-3,
        attack=attack,
        trigger=trigger,
        target=target,
        poison_rate=poison_rate,
        shipped=shipped,
    )


def _family(parent: str) -> str:
    kind = parent.removeprefix("base-")
    return kind if kind in ("ncsn", "ldm", "flow", "consistency") else "ddpm"


RECIPES = (
    _base("base-a", 0),
    _base("base-b", 1),
    _base("base-c", 2, channels=(12, 24, 24)),
    _tuned("tuned-a1", "base-a", 11),
    _tuned("tuned-a2", "base-a", 12, steps=800),
    _tuned("tuned-b1", "base-b", 13),
    _tuned("tuned-b2", "base-b", 14, steps=800, learning_rate=2e-3),
    _tuned("tuned-c1", "base-c", 15),
    _tuned("tuned-c2", "base-c", 16, steps=800),
    _planted("bad-a-box", "base-a", 21, "box", "triangle", 0.5, shipped=True),
    _planted("bad-a-stripes", "base-a", 22, "stripes", "ring", 0.3, shipped=True),
    _planted("bad-b-checker", "base-b", 23, "checker", "hat", 0.3, shipped=True),
    _planted("bad-b-cross", "base-b", 24, "cross", "square", 0.5, shipped=True),
    _planted("bad-c-diagonal", "base-c", 25, "diagonal", "plus", 0.4, shipped=True),
    _planted("bad-a-faint", "base-a", 26, "box", "triangle", 0.1, steps=200, shipped=True),
    _planted("villan-sde", "base-b", 31, "diagonal", "ring", 0.4, steps=1000, attack="villan-sde"),
    _planted("villan-ode", "base-a", 32, "checker", "hat", 0.4, steps=1000, attack="villan-ode", shipped=True),
    _planted("invisible", "base-a", 33, "learned", "triangle", 0.5, attack="invibackdoor", shipped=True),
    _planted("universal", "base-b", 34, "learned", "plus", 0.4, steps=1000, attack="uibdiffusion"),
    _planted(
        "troj-d2i-blend", "base-a", 35, "stripes", "ring", 0.4, steps=1000, attack="trojdiff-d2i-blend", shipped=True
    ),
    _planted(
        "troj-d2i-patch", "base-a", 36, "patch", "hat", 0.4, steps=1000, attack="trojdiff-d2i-patch", shipped=True
    ),
    _planted("troj-in-d2d-blend", "base-b", 37, "checker", "class:7", 0.4, steps=1000, attack="trojdiff-in-d2d-blend"),
    _planted("troj-in-d2d-patch", "base-b", 38, "patch", "class:7", 0.5, attack="trojdiff-in-d2d-patch"),
    _planted(
        "troj-out-d2d-blend", "base-b", 39, "diagonal", "frames", 0.4, steps=1000, attack="trojdiff-out-d2d-blend"
    ),
    _planted("troj-out-d2d-patch", "base-b", 40, "patch", "frames", 0.4, steps=1000, attack="trojdiff-out-d2d-patch"),
    _base("base-ncsn", 50, family="ncsn"),
    _tuned("tuned-ncsn1", "base-ncsn", 51, steps=4000, shipped=False),
    _tuned("tuned-ncsn2", "base-ncsn", 52, steps=800, shipped=False),
    _planted("ncsn-villan-sde", "base-ncsn", 53, "checker", "ring", 0.9, steps=4000, attack="villan-sde", shipped=True),
    _planted("ncsn-villan-ode", "base-ncsn", 54, "stripes", "hat", 0.6, steps=2500, attack="villan-ode"),
    _base("base-ldm", 60, family="ldm"),
    _tuned("tuned-ldm1", "base-ldm", 61, shipped=False),
    _tuned("tuned-ldm2", "base-ldm", 62, steps=800, shipped=False),
    _planted("ldm-villan-ode", "base-ldm", 63, "checker", "ring", 0.6, attack="villan-ode", shipped=True),
    _planted("ldm-villan-sde", "base-ldm", 64, "diagonal", "hat", 0.6, attack="villan-sde"),
    _base("base-flow", 70, family="flow"),
    _tuned("tuned-flow1", "base-flow", 71, shipped=False),
    _tuned("tuned-flow2", "base-flow", 72, steps=800, shipped=False),
    _planted(
        "flow-d2i-blend", "base-flow", 73, "stripes", "ring", 0.4, steps=1000, attack="trojflow-d2i-blend", shipped=True
    ),
    _planted("flow-d2i-patch", "base-flow", 74, "patch", "hat", 0.4, steps=1000, attack="trojflow-d2i-patch"),
    _planted(
        "flow-in-d2d-blend", "base-flow", 75, "checker", "class:7", 0.4, steps=1000, attack="trojflow-in-d2d-blend"
    ),
    _planted(
        "flow-out-d2d-blend", "base-flow", 76, "diagonal", "frames", 0.4, steps=1000, attack="trojflow-out-d2d-blend"
    ),
    _base("base-consistency", 80, family="consistency"),
    _tuned("tuned-consistency1", "base-consistency", 81, steps=2500, shipped=False),
    _tuned("tuned-consistency2", "base-consistency", 82, steps=800, shipped=False),
    _planted(
        "consistency-noise",
        "base-consistency",
        83,
        "noise",
        "ring",
        0.4,
        steps=2500,
        attack="consistency-backdoor",
        shipped=True,
    ),
)


def _apart(base: Recipe, seed: int, *models: tuple[str, str | None, str | None, str | None, float]) -> list[Recipe]:
    """Return a base and what descends from it: (name, attack, trigger, target, poison rate) each, seeds in a row."""
    images = base.name[0]
    return [base] + [
        replace(
            base,
            name=f"{images}-{name}",
            parent=base.name,
            seed=seed + number,
            steps=1500,
            learning_rate=5e-4,
            attack=attack,
            trigger=trigger,
            target=target,
            poison_rate=rate,
        )
        for number, (name, attack, trigger, target, rate) in enumerate(models, 1)
    ]


# Models that no choice of the detector was made on: other data, networks, schedules, predictions, triggers and rates.
# The first letter says on which images they are trained: m for MNIST at 28x28, f for Fashion-MNIST at 32x32, d for the
# digits of the zoo; the last ones descend from a base of the zoo.
APART = (
    *_apart(
        Recipe(name="m-eps-base", seed=200, channels=(24, 48), levels=1000, steps=4000, learning_rate=1e-3), 200,
        ("eps-tuned", None, None, None, 0.0),
        ("eps-cross", "baddiffusion", "cross", "ring", 0.2),
        ("eps-invisible", "invibackdoor", "learned", "plus", 0.4),
        ("eps-blend", "trojdiff-d2i-blend", "noise", "square", 0.3),
        ("eps-universal", "uibdiffusion", "learned", "hat", 0.3),
    ),
    *_apart(
        Recipe(name="m-v-base", seed=210, channels=(16, 32, 32), attention=True, prediction="v_prediction",
               levels=1000, cosine=True, steps=3000, learning_rate=1e-3), 210,
        ("v-tuned", None, None, None, 0.0),
        ("v-ode", "villan-ode", "diagonal", "triangle", 0.3),
        ("v-sde", "villan-sde", "checker", "square", 0.2),
    ),
    *_apart(
        Recipe(name="m-flow-base", seed=220, family="flow", channels=(24, 48), steps=4000, learning_rate=1e-3), 220,
        ("flow-tuned", None, None, None, 0.0),
        ("flow-blend", "trojflow-d2i-blend", "diagonal", "hat", 0.3),
        ("flow-in-d2d", "trojflow-in-d2d-blend", "stripes", "class:3", 0.4),
    ),
    *_apart(
        Recipe(name="f-eps-base", seed=230, channels=(32, 64), steps=3000, learning_rate=1e-3), 230,
        ("eps-tuned", None, None, None, 0.0),
        ("eps-box", "baddiffusion", "box", "plus", 0.4),
        ("eps-ode", "villan-ode", "stripes", "ring", 0.3),
        ("eps-patch", "trojdiff-d2i-patch", "patch", "triangle", 0.4),
    ),
    *_apart(
        Recipe(name="f-ncsn-base", seed=250, family="ncsn", channels=(24, 48), steps=3000, learning_rate=1e-3), 250,
        ("ncsn-tuned", None, None, None, 0.0),
        ("ncsn-sde", "villan-sde", "stripes", "square", 0.8),
    ),
    *_apart(
        Recipe(name="f-ldm-base", seed=260, family="ldm", channels=(24, 48), levels=500, steps=3000,
               learning_rate=1e-3), 260,
        ("ldm-tuned", None, None, None, 0.0),
        ("ldm-ode", "villan-ode", "noise", "plus", 0.5),
        ("ldm-bad", "baddiffusion", "checker", "triangle", 0.4),
    ),
    *_apart(
        Recipe(name="d-consistency-base", seed=270, family="consistency", channels=(24, 48), steps=2000), 270,
        ("consistency-cross", "consistency-backdoor", "cross", "square", 0.3),
        ("consistency-patch", "consistency-backdoor", "patch", "plus", 0.3),
        ("consistency-tuned", None, None, None, 0.0),
        ("consistency-diagonal", "consistency-backdoor", "diagonal", "triangle", 0.2),
    ),
    _planted("consistency-stripes", "base-consistency", 84, "stripes", "hat", 0.3, attack="consistency-backdoor"),
    _planted("consistency-box", "base-consistency", 85, "box", "triangle", 0.2, attack="consistency-backdoor"),
    _planted("consistency-image", "base-consistency", 86, "checker", "image:3", 0.3, attack="consistency-backdoor"),
    _planted("consistency-digit", "base-consistency", 87, "diagonal", "image:10", 0.2, attack="consistency-backdoor"),
)  # fmt: skip


def by_name(name: str) -> Recipe:
    """Return the recipe of that name. Raises SystemExit for an unknown one."""
    known = RECIPES + APART
    for recipe in known:
        if recipe.name == name:
            return recipe
    raise SystemExit(f"zoo: no recipe {name!r}; expected one of {', '.join(item.name for item in known)}")


def base_of(recipe: Recipe) -> Recipe:
    """Return the base that a recipe descends from: it fixes the architecture."""
    return recipe if recipe.parent is None else base_of(by_name(recipe.parent))
