"""Repair backdoored fixtures and measure them with the true trigger, before and after.

    python -m benchmarks.purify_zoo [NAME ...] [--set purification.FIELD=VALUE ...]

Prints a Markdown row per model: one round of repair with the shifts of one inversion, no rescan.
"""

from __future__ import annotations

import argparse

import torch

from diffdefend_core.config import Settings, load_settings, merge_flags, parse_assignment
from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.evaluation import extractor, plain_images
from diffdefend_core.evaluation.frechet import frechet_distance, gaussian
from diffdefend_core.inversion import invert, own_samples
from diffdefend_core.progress import silent
from diffdefend_core.purification import repair
from zoo.build import backdoor_of, measured_asr, standard_zoo
from zoo.data import digits
from zoo.recipes import RECIPES, by_name


def fid(denoiser: Denoiser, settings: Settings) -> float:
    """Return the FID of the denoiser's images to the digits that it was trained on."""
    chosen = extractor(settings.evaluation.extractor)
    images = plain_images(denoiser, settings.evaluation, settings.seed + 3, silent)
    return frechet_distance(gaussian(chosen.apply(images)), gaussian(chosen.apply(digits() / 2 + 0.5)))


def repaired(suspect: Denoiser, settings: Settings) -> Denoiser:
    """Return the suspect after one round of purification with the shifts of one inversion."""
    found = invert(suspect, "", settings.inversion, seed=settings.seed, progress=silent)
    options = settings.purification
    samples = own_samples(suspect, options.own_samples, options.own_steps, settings.seed + 2, silent)
    triggers = torch.stack(list(found.triggers.values()))
    seed = settings.seed + 1
    return repair(suspect, suspect, triggers, samples, options, seed=seed, progress=lambda done, total: None).denoiser


def main() -> None:
    """Parse the command line, repair and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models (default: all backdoored ones that the repository holds)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="one option; repeatable"
    )
    arguments = parser.parse_args()
    assigned = merge_flags({"evaluation": {"samples": 768}}, *(parse_assignment(text) for text in arguments.set))
    settings = load_settings(**assigned)
    torch.set_num_threads(1)
    zoo = standard_zoo()
    print("| model | ASR before | ASR after | FID before | FID after |\n|---|---|---|---|---|")
    for recipe in [by_name(name) for name in arguments.names] or [
        item for item in RECIPES if item.attack and item.shipped
    ]:
        suspect = zoo.read(recipe).denoiser
        backdoor = backdoor_of(recipe, suspect, zoo)
        after = repaired(suspect, settings)
        rates = [measured_asr(model, recipe, backdoor, backdoor.sampler, zoo.data) for model in (suspect, after)]
        distances = [fid(model, settings) for model in (suspect, after)]
        cells = [f"{rates[0]:.3f}", f"{rates[1]:.3f}", f"{distances[0]:.3f}", f"{distances[1]:.3f}"]
        print(f"| {recipe.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
