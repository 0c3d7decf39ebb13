"""Every family: what diffusers saved is loaded as diffusers would compute it, and saved again with other weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMPipeline,
    PNDMScheduler,
    VQModel,
)
from safetensors.torch import load_file
from tiny_models import BETAS, STEPS, save_tiny_pipeline, tiny_autoencoder, tiny_pipeline, tiny_unet
from torch import Tensor

from diffdefend_core.diffusion.denoiser import Denoiser
from diffdefend_core.diffusion.training import fine_tune, ordinary_loss
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.build import load_denoiser, save_denoiser
from diffdefend_core.loading.families import FAMILIES
from diffdefend_core.loading.static import inspect_folder

WORDS = [family.word for family in FAMILIES]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DECODER = "vqvae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models of every family as diffusers wrote them; nobody changes them."""
    root = tmp_path_factory.mktemp("families")
    for word in WORDS:
        save_tiny_pipeline(root / word, word)
    return {word: root / word for word in WORDS}


def batch(denoiser: Denoiser, t: int) -> tuple[Tensor, Tensor]:
    """Return x_t of pure noise, and t, for two rows."""
    eps = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(1))
    index = torch.full((2,), t)
    _, sigma = denoiser.levels.at(index, eps)
    return sigma * eps, index


def edit(folder: Path, name: str, **changes: object) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**value, **changes}))


def drop(folder: Path, name: str, key: str) -> None:
    value = json.loads((folder / name).read_text())
    del value[key]
    (folder / name).write_text(json.dumps(value))


def ddpm_noise(pipeline: Any, x: Tensor, t: int) -> Tensor:
    return pipeline.unet(x, t).sample


def ncsn_noise(pipeline: Any, x: Tensor, t: int) -> Tensor:
    """ScoreSdeVePipeline tells the network sigma itself and takes its answer for the score."""
    sigma = pipeline.scheduler.discrete_sigmas[t]
    return -sigma * pipeline.unet(x, sigma * torch.ones(len(x))).sample


def flow_noise(pipeline: Any, x: Tensor, t: int) -> Tensor:
    scheduler = pipeline.scheduler
    sigma, told = scheduler.sigmas.flip(0)[t], scheduler.timesteps.flip(0)[t]
    return x + (1 - sigma) * pipeline.unet(x, told).sample


def consistency_noise(pipeline: Any, x: Tensor, t: int) -> Tensor:
    """The boundary scalings are those of the scheduler."""
    scheduler = pipeline.scheduler
    sigma, told = scheduler.sigmas.flip(0)[t], scheduler.timesteps.flip(0)[t]
    skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
    scaled = (x / (sigma**2 + scheduler.config.sigma_data**2) ** 0.5).float()
    return ((x - skip * x - out * pipeline.unet(scaled, told).sample) / sigma).float()


NOISE: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "ddpm": ddpm_noise, "ncsn": ncsn_noise, "flow": flow_noise, "consistency": consistency_noise, "ldm": ddpm_noise,
}  # fmt: skip
LEVELS = {"consistency": 40}


@pytest.mark.parametrize("word", WORDS)
def test_the_answers_are_those_of_diffusers_at_every_kind_of_level(word: str, saved: dict[str, Path]) -> None:
    theirs, ours = tiny_pipeline(word), load_denoiser(saved[word])
    assert (ours.family, len(ours.levels)) == (word, LEVELS.get(word, STEPS))
    for t in (0, len(ours.levels) // 2, len(ours.levels) - 1):
        x, index = batch(ours, t)
        with torch.no_grad():
            torch.testing.assert_close(ours.noise(x, index), NOISE[word](theirs, x, t), rtol=1e-4, atol=1e-4)
    x, first = batch(ours, 0)
    with torch.no_grad():
        assert not torch.allclose(ours.noise(x, first), ours.noise(x, first + len(ours.levels) // 2), atol=1e-3)


@pytest.mark.parametrize("word", WORDS)
def test_the_inspection_says_what_is_built(word: str, saved: dict[str, Path]) -> None:
    found, ours = inspect_folder(saved[word]), load_denoiser(saved[word])
    assert (found.family, found.shape, found.picture_shape) == (word, ours.shape, ours.picture_shape)
    assert found.schedule.kind == ours.process or word == "ldm"
    assert next(row.process for row in FAMILIES if row.word == word) == ours.process
    assert found.parameters == sum(t.numel() for name in found.weights_sha256 for t in
                                   load_file(saved[word] / name).values())  # fmt: skip
    assert sorted(found.weights_sha256) == ([WEIGHTS, DECODER] if word == "ldm" else [WEIGHTS])
    assert ours.value_range == ((0.0, 1.0) if word == "ncsn" else (-1.0, 1.0))
    assert found.findings == ()


@pytest.mark.parametrize("word", WORDS)
def test_a_saved_model_differs_in_the_network_alone(word: str, saved: dict[str, Path], tmp_path: Path) -> None:
    ours = load_denoiser(saved[word])
    repaired = ours.clone()
    with torch.no_grad():
        for parameter in repaired.network.parameters():
            parameter.mul_(0.5)
    inspection = save_denoiser(repaired, saved[word], tmp_path / "saved")
    before = {file.path: file.sha256 for file in inspect_folder(saved[word]).files}
    after = {file.path: file.sha256 for file in inspection.files}
    assert {name for name in before if before[name] != after[name]} == {WEIGHTS} and before.keys() == after.keys()
    again = load_denoiser(tmp_path / "saved")
    x, t = batch(ours, len(ours.levels) // 2)
    with torch.no_grad():
        torch.testing.assert_close(again.noise(x, t), repaired.noise(x, t))
        assert not torch.allclose(again.noise(x, t), ours.noise(x, t), atol=1e-3)


@pytest.mark.parametrize("word", WORDS)
def test_a_loaded_model_can_be_trained_without_its_fixed_parts(word: str, saved: dict[str, Path]) -> None:
    ours = load_denoiser(saved[word])
    before = {name: value.clone() for name, value in ours.network.state_dict().items()}
    data = torch.rand(8, *ours.shape, generator=torch.Generator().manual_seed(0))
    loss = ordinary_loss(data, 4)
    list(fine_tune(ours, loss, steps=2, learning_rate=1e-2, generator=torch.Generator().manual_seed(0)))
    after = ours.network.state_dict()
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    assert fixed == ({"unet.time_proj.weight"} if word == "ncsn" else set())
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())


def test_a_score_network_with_skip_blocks_is_loaded(tmp_path: Path) -> None:
    unet = tiny_unet(
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=None,
        time_embedding_type="fourier",
        mid_block_scale_factor=2**0.5,
    )
    theirs = tiny_pipeline("ncsn", unet=unet)
    theirs.save_pretrained(tmp_path / "ve")
    ours = load_denoiser(tmp_path / "ve")
    x, t = batch(ours, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours.noise(x, t), ncsn_noise(theirs, x, 30), rtol=1e-4, atol=1e-4)


def test_the_end_of_a_consistency_path_is_that_of_the_scheduler(saved: dict[str, Path]) -> None:
    theirs, ours = tiny_pipeline("consistency"), load_denoiser(saved["consistency"])
    scheduler = theirs.scheduler
    scheduler.set_timesteps(1)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    with torch.no_grad():
        output = theirs.unet(scheduler.scale_model_input(x, scheduler.timesteps[0]), scheduler.timesteps[0]).sample
        step = scheduler.step(output, scheduler.timesteps[0], x)
        index = torch.full((2,), len(ours.levels) - 1)
        torch.testing.assert_close(ours.x0(x, index).clamp(-1, 1), step.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_latents_are_decoded_as_diffusers_does(kind: type, tmp_path: Path) -> None:
    theirs = tiny_pipeline("ldm", vqvae=tiny_autoencoder(kind, scaling_factor=0.5))
    theirs.save_pretrained(tmp_path / "ldm")
    ours = load_denoiser(tmp_path / "ldm")
    assert (ours.shape, ours.picture_shape, ours.clean_range) == ((3, 8, 8), (3, 16, 16), None)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(latents), theirs.vqvae.decode(latents / 0.5).sample)
        encoded = theirs.vqvae.encode(pictures)
        mean = encoded.latents if kind is VQModel else encoded.latent_dist.mean
        torch.testing.assert_close(ours.encode(pictures), mean * 0.5)
        torch.testing.assert_close(ours.encode(pictures), ours.encode(pictures), rtol=0, atol=0)
    state = ours.clone().network.state_dict()
    assert not any("encoder" in name for name in state)


def test_latents_without_a_scaling_factor_are_decoded_unscaled_and_that_is_said(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["ldm"], tmp_path / "ldm"))
    drop(folder, "vqvae/config.json", "scaling_factor")
    ours = load_denoiser(folder)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(latents), tiny_autoencoder().decode(latents).sample)
    assert any("no scaling_factor" in finding for finding in inspect_folder(folder).findings)


def test_a_pndm_pipeline_is_loaded(tmp_path: Path) -> None:
    PNDMPipeline(tiny_unet(), PNDMScheduler(**BETAS)).save_pretrained(tmp_path / "pndm")
    ours = load_denoiser(tmp_path / "pndm")
    x, t = batch(ours, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours.noise(x, t), tiny_unet()(x, t).sample, rtol=0, atol=1e-6)


def test_the_scheduler_decides_between_families_of_one_pipeline_class(tmp_path: Path) -> None:
    for word, scheduler in (("flow", FlowMatchEulerDiscreteScheduler()), ("ddpm", HeunDiscreteScheduler())):
        DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / word)
        found = inspect_folder(tmp_path / word)
        assert (found.family, found.pipeline, len(found.schedule.alpha)) == (word, "DDPMPipeline", 1000)


def index_without_decoder(folder: Path) -> None:
    drop(folder, "model_index.json", "vqvae")


def no_decoder_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vqvae")


def no_decoder_weights(folder: Path) -> None:
    (folder / DECODER).unlink()


@pytest.mark.parametrize("damage", [index_without_decoder, no_decoder_folder, no_decoder_weights])
def test_a_latent_model_without_its_decoder_is_refused(
    damage: Callable[[Path], None], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["ldm"], tmp_path / "ldm"))
    damage(folder)
    with pytest.raises(
        ModelRejectedError, match=r"the decoder of the latents.* (is|are) missing|names no vqvae"
    ) as caught:
        inspect_folder(folder)
    assert "\n" not in str(caught.value) and "the decoder of the latents" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "name", "changes", "words"),
    [
        ("flow", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("ncsn", "scheduler/scheduler_config.json", {"sigma_max": 1.0}, "its last level is not noise"),
        ("ncsn", "model_index.json", {"scheduler": ["diffusers", "DDPMScheduler"]}, "scheduler in model_index.json"),
        ("consistency", "unet/config.json", {"time_embedding_type": "fourier"}, "positive numbers"),
        ("consistency", "unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("ncsn", "unet/config.json", {"time_embedding_type": "learned", "num_train_timesteps": 100}, "learned"),
        ("ncsn", "unet/config.json", {"time_embedding_type": "learned"}, "num_train_timesteps"),
        ("flow", "unet/config.json", {"num_train_timesteps": "os.system"}, "num_train_timesteps"),
        ("ldm", "model_index.json", {"vqvae": ["diffusers", "AutoencoderTiny"]}, "vqvae in model_index.json is"),
        ("ldm", "vqvae/config.json", {"latent_channels": 4, "vq_embed_dim": 4}, "latents of 3 channels"),
        ("ldm", "vqvae/config.json", {"norm_type": "spatial"}, "norm_type"),
        ("ldm", "vqvae/config.json", {"scaling_factor": 0}, "scaling_factor"),
        ("ldm", "vqvae/config.json", {"out_channels": 1}, "in_channels, which is 3"),
        ("ldm", "vqvae/config.json", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("ldm", "vqvae/config.json", {"_class_name": "AutoencoderKL"}, "is of class 'AutoencoderKL'"),
    ],
)
def test_what_is_off_the_list_is_refused_in_one_line(
    word: str, name: str, changes: dict[str, object], words: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[word], tmp_path / word))
    edit(folder, name, **changes)
    with pytest.raises(ModelRejectedError, match=words) as caught:
        inspect_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_shifted_latent_space_is_refused(tmp_path: Path) -> None:
    tiny_pipeline("ldm", vqvae=tiny_autoencoder(AutoencoderKL)).save_pretrained(tmp_path / "kl")
    inspect_folder(tmp_path / "kl")
    edit(tmp_path / "kl", "vqvae/config.json", shift_factor=0.1)
    with pytest.raises(ModelRejectedError, match="shift_factor"):
        inspect_folder(tmp_path / "kl")


def test_weights_of_a_decoder_that_do_not_fit_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["ldm"], tmp_path / "ldm"))
    edit(folder, "vqvae/config.json", num_vq_embeddings=8)
    with pytest.raises(ModelRejectedError, match=r"quantize\.embedding\.weight has shape"):
        load_denoiser(folder)


def test_ddim_pipelines_do_not_keep_a_flow_scheduler(tmp_path: Path) -> None:
    """Why a flow must be saved as a DDPMPipeline: diffusers itself turns its scheduler into a DDIMScheduler."""
    from diffusers import DDIMPipeline

    pipeline: DiffusionPipeline = DDIMPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler())
    assert isinstance(pipeline.scheduler, DDIMScheduler)
