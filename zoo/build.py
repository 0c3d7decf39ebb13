"""Build the zoo: train what is missing, write diffusers pipelines with a model card each.

    python -m zoo.build [NAME ...] [--shipped] [--data PATH] [--to FOLDER]

A model that is already there is kept; delete its folder to train it again. Without `--data` the models learn
scikit-learn's digits; with it the same recipes learn the images of the file, in a folder of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from diffdefend_core.attacks.form import Backdoor
from diffdefend_core.attacks.plans import CLASS, OTHER, find
from diffdefend_core.attacks.plant import fire
from diffdefend_core.attacks.shapes import frames
from diffdefend_core.attacks.uibdiffusion import small_classifier
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.samplers import find as find_sampler
from diffdefend_core.diffusion.samplers import fitting
from diffdefend_core.diffusion.samplers.trojdiff import NAMES, TROJDIFF_DDIM, TROJDIFF_DDPM
from diffdefend_core.errors import InputError
from diffdefend_core.stages.model import device_of
from zoo.data import Data, digits_data, npz_data
from zoo.networks import Model, read, save, untrained
from zoo.recipes import RECIPES, Recipe, base_of, by_name
from zoo.train import planned, train

HERE = Path(__file__).parent / "digits"
BUILT = Path(__file__).parent / "built"
ASR_THRESHOLD = 0.05
ASR_SAMPLES = 64


@dataclass(frozen=True)
class Zoo:
    """Where models lie: what the repository holds in `shipped`, the rest in `built`; and the data they learn."""

    shipped: Path
    built: Path
    data: Data
    device: str = "cpu"

    def place(self, recipe: Recipe) -> Path:
        """Return the folder of a model."""
        return (self.shipped if recipe.shipped else self.built) / recipe.name

    def backdoor_file(self, recipe: Recipe) -> Path:
        """Return where trigger and target of a backdoored model lie."""
        return self.place(recipe).parent / "backdoors" / f"{recipe.name}.safetensors"

    def read(self, recipe: Recipe) -> Model:
        """Return a built model."""
        return read(base_of(recipe), self.data.size, self.place(recipe)).to(self.device)


def standard_zoo() -> Zoo:
    """Return the zoo of the repository: models of scikit-learn's digits."""
    return Zoo(HERE, BUILT / "digits", digits_data())


def zoo_of(path: Path, *, unpadded: bool = False, to: Path | None = None, device: str = "cpu") -> Zoo:
    """Return the zoo of the images in an npz file, at 32x32 or as they are; its models lie in `to`, else in `built`.

    Raises SystemExit for a file that cannot be read.
    """
    data = npz_data(path, 0 if unpadded else 2)
    folder = to or BUILT / (data.name.split()[0] + ("-unpadded" if unpadded else ""))
    return Zoo(folder, folder, data, device)


def device(name: str) -> str:
    """Return the torch device of that name, for argparse. Raises ArgumentTypeError if it is not there."""
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"found {name!r}; expected cpu, cuda, cuda:1 or mps")
    try:
        return device_of(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def backdoor_of(recipe: Recipe, denoiser: Denoiser, zoo: Zoo) -> Backdoor:
    """Return the backdoor of a built model, with the trigger that was planted."""
    from safetensors.torch import load_file

    plan = planned(recipe, denoiser, zoo.data)
    return replace(plan, trigger=load_file(zoo.backdoor_file(recipe))["trigger"])


def success(recipe: Recipe, denoiser: Denoiser, images: Tensor, data: Data) -> float:
    """Return the attack success rate of triggered samples (clean x0): the share that paints what the attacker wants.

    A picture: mean squared error below .05 in [0, 1]. A class, or another distribution: as a small classifier says
    that was trained on the data with random frames as one more class.
    """
    pictures = denoiser.pictures(images.to(denoiser.device)).cpu()
    paints = find(str(recipe.attack)).paints
    if paints in (CLASS, OTHER):
        classes = int(data.labels.max()) + 1
        wanted = classes if paints == OTHER else int(str(recipe.target).removeprefix("class:"))
        return (judge(data)(pictures).argmax(1) == wanted).float().mean().item()
    goal = planned_picture(recipe, data)
    return ((pictures - goal).square().mean((1, 2, 3)) < ASR_THRESHOLD).float().mean().item()


@functools.cache
def judge(data: Data) -> nn.Module:
    """Return a classifier of the data's classes and one more, random frames."""
    classes = int(data.labels.max()) + 1
    other = frames(len(data.labels) // classes, data.size, seed=1) / 2 + 0.5
    labels = torch.cat([data.labels, torch.full((len(other),), classes)])
    return small_classifier(torch.cat([data.images, other]), labels, steps=600, seed=1)


def planned_picture(recipe: Recipe, data: Data) -> Tensor:
    """Return the one picture [1, S, S] in [0, 1] that a recipe's attack paints."""
    from zoo.train import targets

    return targets(recipe, data)[0]


def measured_asr(denoiser: Denoiser, recipe: Recipe, backdoor: Backdoor, sampler: str, data: Data) -> float:
    """Return the attack success rate under one sampler at its usual number of steps."""
    steps = {TROJDIFF_DDPM: 1000, TROJDIFF_DDIM: 50}.get(sampler) or find_sampler(sampler).steps
    images = fire(denoiser, backdoor, ASR_SAMPLES, sampler=sampler, steps=steps, seed=1)
    return success(recipe, denoiser, images, data)


def samplers_of(denoiser: Denoiser, backdoor: Backdoor) -> list[str]:
    """Return the samplers under which a backdoor is measured: all that fit, and the attack's own."""
    own = NAMES if backdoor.sampler in NAMES else ()
    return [*own, *(entry.name for entry in fitting(denoiser))]


def card(recipe: Recipe, model: Model, backdoor: Backdoor | None, loss: float, zoo: Zoo) -> dict[str, object]:
    """Return the model card: how it was made, and for a backdoored one the measured ASR and its negative control."""
    facts: dict[str, object] = {
        "name": recipe.name,
        "data": zoo.data.name,
        "family": recipe.family,
        "parent": recipe.parent,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "loss": round(loss, 5),
        "backdoored": recipe.attack is not None,
    }
    if backdoor is not None:
        parent = zoo.read(by_name(str(recipe.parent))).denoiser
        measure = [backdoor.sampler, *(name for name in samplers_of(model.denoiser, backdoor)[:3])]
        facts |= {
            "attack": recipe.attack,
            "trigger": recipe.trigger,
            "target": recipe.target,
            "poison_rate": recipe.poison_rate,
            "sampler": backdoor.sampler,
            "asr_threshold": ASR_THRESHOLD,
            "asr_samples": ASR_SAMPLES,
            "asr": {
                name: measured_asr(model.denoiser, recipe, backdoor, name, zoo.data) for name in dict.fromkeys(measure)
            },
            "asr_of_clean_parent": measured_asr(parent, recipe, backdoor, backdoor.sampler, zoo.data),
        }
    return facts


def write_card(facts: dict[str, object], folder: Path) -> None:
    """Write the card as README.md with its facts as a JSON block."""
    kind = f"a {facts['attack']} backdoor (red-team fixture, never deploy)" if facts["backdoored"] else "no backdoor"
    text = f"# {facts['name']}\n\nA small {facts.get('family')} model for the tests of DiffDefend, with {kind}.\n\n"
    (folder / "README.md").write_text(text + "```json\n" + json.dumps(facts, indent=2) + "\n```\n")


def write_backdoor(recipe: Recipe, denoiser: Denoiser, backdoor: Backdoor, zoo: Zoo) -> None:
    """Write the backdoor of a model beside the model folders, as the evaluation reads it (`known_trigger`)."""
    from safetensors.torch import save_file

    path = zoo.backdoor_file(recipe)
    path.parent.mkdir(exist_ok=True)
    low, high = denoiser.value_range
    target = low + planned_picture(recipe, zoo.data) * (high - low)
    gamma = torch.as_tensor(backdoor.attack.gamma).expand(denoiser.shape)
    tensors = {"trigger": backdoor.trigger.detach(), "target": target, "gamma": gamma}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"sampler": backdoor.sampler})


def build(recipe: Recipe, zoo: Zoo, bar: Progress | None = None) -> None:
    """Train and write one model, its parent first. A finished folder (with a card) is left as it is."""
    place = zoo.place(recipe)
    if (place / "README.md").exists():
        return
    if recipe.parent is not None:
        parent = by_name(recipe.parent)
        build(parent, zoo, bar)
        model = zoo.read(parent)
    else:
        model = untrained(recipe, zoo.data.size, recipe.seed).to(zoo.device)
    task = bar.add_task(recipe.name, total=recipe.steps) if bar is not None else None

    def show(done: int, total: int) -> None:
        if bar is not None and task is not None:
            bar.update(task, completed=done, total=total)

    loss, backdoor = train(recipe, model, zoo.data, show)
    place.mkdir(parents=True, exist_ok=True)
    save(base_of(recipe), model, place)
    if backdoor is not None:
        write_backdoor(recipe, model.denoiser, backdoor, zoo)
    facts = card(recipe, zoo.read(recipe), backdoor, loss, zoo)
    write_card(facts, place)
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to build (default: all)")
    parser.add_argument("--shipped", action="store_true", help="only the models that the repository holds")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="npz file (or a folder with fashion-mnist.npz) to learn instead"
    )
    parser.add_argument("--unpadded", action="store_true", help="keep the images of the file at 28x28")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--device", type=device, default="cpu", help="where to train (default: cpu)")
    arguments = parser.parse_args()
    if arguments.unpadded and arguments.data is None:
        parser.error("--unpadded without --data; expected the file whose images are kept at 28x28")
    zoo = replace(standard_zoo(), device=arguments.device)
    if arguments.data is not None:
        zoo = zoo_of(arguments.data, unpadded=arguments.unpadded, to=arguments.to, device=arguments.device)
    elif arguments.to is not None:
        zoo = replace(zoo, shipped=arguments.to, built=arguments.to)
    torch.set_num_threads(1)  # the networks are small: start one process per core for different names instead
    chosen = [by_name(name) for name in arguments.names] or [
        recipe for recipe in RECIPES if recipe.shipped or not arguments.shipped
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr)) as bar:
        for recipe in chosen:
            build(recipe, zoo, bar)


if __name__ == "__main__":
    main()
