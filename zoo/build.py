"""Build the zoo: train what is missing, write diffusers pipelines with a model card each.

    python -m zoo.build [NAME ...] [--to FOLDER]

A model that is already there is kept; delete its folder to train it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.random import generators, standard_normal
from diffdefend_core.diffusion.samplers import SAMPLERS
from zoo.recipes import RECIPES, Recipe
from zoo.shapes import target, trigger
from zoo.train import fresh, save, train

HERE = Path(__file__).parent / "digits"
ASR_THRESHOLD = 0.05
ASR_SAMPLES = 64


def read(recipe: Recipe, folder: Path) -> Denoiser:
    """Return a built model in float32."""
    from safetensors.torch import load_file

    denoiser = fresh(base_of(recipe))
    weights = load_file(folder / recipe.name / "unet" / "diffusion_pytorch_model.safetensors")
    denoiser.network.unet.load_state_dict({name: value.float() for name, value in weights.items()})
    return denoiser.freeze()


def measured_asr(denoiser: Denoiser, recipe: Recipe, sampler: str, steps: int) -> float:
    """Return the share of triggered samples whose mean squared error to the target, in [0, 1], is below .05."""
    noise = standard_normal(generators(1, ASR_SAMPLES), denoiser.shape) + trigger(str(recipe.trigger))
    images = SAMPLERS[sampler](denoiser, noise, steps=steps, streams=generators(2, ASR_SAMPLES))
    error = ((images.clamp(-1, 1) - target(str(recipe.target))) / 2).square().mean((1, 2, 3))
    return (error < ASR_THRESHOLD).float().mean().item()


def card(recipe: Recipe, denoiser: Denoiser, loss: float, folder: Path) -> dict[str, object]:
    """Return the model card: how it was made, and for a backdoored one the measured ASR and its negative control."""
    facts: dict[str, object] = {
        "name": recipe.name,
        "data": "scikit-learn digits, enlarged to 16x16",
        "family": "ddpm",
        "parent": recipe.parent,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "loss": round(loss, 5),
        "backdoored": recipe.attack is not None,
    }
    if recipe.attack is not None:
        parent = read(by_name(str(recipe.parent)), folder)
        levels = len(denoiser.levels)
        facts |= {
            "attack": recipe.attack,
            "trigger": recipe.trigger,
            "target": recipe.target,
            "poison_rate": recipe.poison_rate,
            "sampler": "ddpm",
            "asr_threshold": ASR_THRESHOLD,
            "asr_samples": ASR_SAMPLES,
            "asr": {
                "ddpm": measured_asr(denoiser, recipe, "ddpm", levels),
                "ddim": measured_asr(denoiser, recipe, "ddim", 50),
            },
            "asr_of_clean_parent": measured_asr(parent, recipe, "ddpm", levels),
        }
    return facts


def write_card(facts: dict[str, object], folder: Path) -> None:
    """Write the card as README.md with its facts as a JSON block."""
    kind = f"a {facts['attack']} backdoor (red-team fixture, never deploy)" if facts["backdoored"] else "no backdoor"
    text = f"# {facts['name']}\n\nA small DDPM for the tests of DiffDefend, with {kind}.\n\n"
    (folder / "README.md").write_text(text + "```json\n" + json.dumps(facts, indent=2) + "\n```\n")


def write_backdoor(recipe: Recipe, folder: Path) -> None:
    """Write trigger and target of a backdoored model beside the model folders: `backdoors/<name>.safetensors`."""
    from safetensors.torch import save_file

    (folder / "backdoors").mkdir(exist_ok=True)
    tensors = {"trigger": trigger(str(recipe.trigger)), "target": target(str(recipe.target))}
    save_file(tensors, folder / "backdoors" / f"{recipe.name}.safetensors")


def by_name(name: str) -> Recipe:
    """Return the recipe of that name. Raises SystemExit for an unknown one."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise SystemExit(f"zoo: no recipe {name!r}; expected one of {', '.join(item.name for item in RECIPES)}")


def base_of(recipe: Recipe) -> Recipe:
    """Return the base that a recipe descends from: it fixes the architecture."""
    return recipe if recipe.parent is None else base_of(by_name(recipe.parent))


def build(recipe: Recipe, folder: Path) -> None:
    """Train and write one model, its parent first. A finished folder (with a card) is left as it is."""
    if (folder / recipe.name / "README.md").exists():
        return
    if recipe.parent is not None:
        build(by_name(recipe.parent), folder)
        denoiser = read(by_name(recipe.parent), folder)
    else:
        denoiser = fresh(recipe)

    def show(done: int, total: int) -> None:
        if done % 500 == 0 or done == total:
            print(f"{recipe.name}: step {done}/{total}", file=sys.stderr, flush=True)

    loss = train(recipe, denoiser, show)
    save(denoiser, folder / recipe.name)
    facts = card(recipe, read(recipe, folder), loss, folder)
    if recipe.attack is not None:
        write_backdoor(recipe, folder)
    write_card(facts, folder / recipe.name)
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models to build (default: all)")
    parser.add_argument("--to", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: start one process per core for different names instead
    for recipe in [by_name(name) for name in arguments.names] or RECIPES:
        build(recipe, arguments.to)


if __name__ == "__main__":
    main()
