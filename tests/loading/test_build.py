"""The Denoiser is the network that diffusers would run, and what is saved is what diffusers loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from safetensors.torch import load_file, save_file
from tiny_models import BETAS, STEPS, tiny_unet

from diffdefend_core.diffusion.families.ddpm import DDPM
from diffdefend_core.errors import ModelRejectedError
from diffdefend_core.loading.build import load_denoiser, save_denoiser
from diffdefend_core.loading.static import inspect_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 40])


def test_the_noise_is_the_output_of_diffusers(model_folder: Path) -> None:
    theirs = DDPMPipeline.from_pretrained(model_folder)
    ours = load_denoiser(model_folder)
    x, t = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.noise(x, t), theirs.unet(x, t).sample, rtol=0, atol=1e-6)
    levels = theirs.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(ours.levels.alpha**2, levels, rtol=1e-4, atol=1e-6)
    assert isinstance(ours, DDPM)
    assert (ours.shape, ours.value_range, ours.prediction, len(ours.levels)) == ((3, 8, 8), (-1, 1), "epsilon", STEPS)
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())


def test_x0_agrees_with_the_scheduler(model_folder: Path) -> None:
    theirs, ours = DDPMPipeline.from_pretrained(model_folder), load_denoiser(model_folder)
    x, t = batch()[0][:1], torch.tensor([25])
    theirs.scheduler.config.clip_sample = False
    with torch.no_grad():
        step = theirs.scheduler.step(theirs.unet(x, t).sample, 25, x)
        torch.testing.assert_close(ours.x0(x, t), step.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_other_prediction_types_agree_with_the_scheduler(tmp_path: Path, prediction: str) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False)
    DDIMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "ddim")
    ours, x, t = load_denoiser(tmp_path / "ddim"), batch()[0][:1], torch.tensor([20])
    scheduler.set_timesteps(50)
    with torch.no_grad():
        step = scheduler.step(tiny_unet()(x, t).sample, 20, x)
        torch.testing.assert_close(ours.x0(x, t), step.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_loading_leaves_the_global_random_state_alone(model_folder: Path) -> None:
    before = torch.get_rng_state()
    load_denoiser(model_folder)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loaded_denoiser_does_not_share_memory_with_its_file(model_folder: Path) -> None:
    content = (model_folder / WEIGHTS).read_bytes()
    ours = load_denoiser(model_folder)
    with torch.no_grad():
        for parameter in ours.network.parameters():
            parameter.zero_()
    assert (model_folder / WEIGHTS).read_bytes() == content


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"attention_head_dim": None},
        {"time_embedding_type": "learned", "num_train_timesteps": STEPS},
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
        {
            "block_out_channels": (32, 32),
            "norm_num_groups": None,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
    ],
)
def test_options_of_the_network_are_honoured(tmp_path: Path, options: dict[str, object]) -> None:
    unet, (x, t) = tiny_unet(**options), batch()
    DDIMPipeline(unet, DDIMScheduler(**BETAS)).save_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(load_denoiser(tmp_path / "m").noise(x, t), unet(x, t).sample, rtol=0, atol=1e-6)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_out_channels": [16, 16]}, r"has shape .* instead of"),
        ({"layers_per_block": 2}, "missing"),
        ({"add_attention": False}, "is not part of the network"),
        ({"norm_num_groups": 5}, "no network can be built"),
        ({"block_out_channels": [8192, 16384], "layers_per_block": 16}, "do not fit"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(model_folder, changes, words) -> None:
    change_config(model_folder, **changes)
    with pytest.raises(ModelRejectedError, match=words):
        load_denoiser(model_folder)


def test_a_renamed_tensor_is_refused(model_folder: Path) -> None:
    tensors = load_file(model_folder / WEIGHTS)
    tensors["conv_in.weights"] = tensors.pop("conv_in.weight")
    save_file(tensors, model_folder / WEIGHTS)
    with pytest.raises(
        ModelRejectedError, match=r"conv_in\.weight is missing \(0 of another shape, 1 missing, 1 surplus"
    ):
        load_denoiser(model_folder)


def use_old_names(folder: Path) -> None:
    """Rename the attention layers as diffusers before 0.11 called them."""
    tensors = load_file(folder / WEIGHTS)
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_old_names_of_attention_layers_are_read_as_diffusers_does(model_folder: Path, tmp_path: Path) -> None:
    x, t = batch()
    with torch.no_grad():
        expected = load_denoiser(model_folder).noise(x, t)
        use_old_names(model_folder)
        ours = load_denoiser(model_folder)
        torch.testing.assert_close(ours.noise(x, t), expected)
        save_denoiser(ours, model_folder, tmp_path / "saved")
        theirs = DDPMPipeline.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(theirs.unet(x, t).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_is_loaded_by_diffusers(model_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    (model_folder / "README.md").write_text("card")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model_folder / WEIGHTS).items()}
    save_file(tensors, model_folder / WEIGHTS, metadata={"format": "pt"})
    ours = load_denoiser(model_folder)
    assert next(ours.network.parameters()).dtype == torch.float32
    repaired = ours.clone()
    with torch.no_grad():
        for parameter in repaired.network.parameters():
            parameter.mul_(0.5)
    inspection = save_denoiser(repaired, model_folder, tmp_path / "saved")
    assert inspection.weights_sha256 != inspect_folder(model_folder).weights_sha256
    assert (tmp_path / "saved/README.md").read_text() == "card"
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / WEIGHTS).values()} == {dtype}
    theirs = DDPMPipeline.from_pretrained(tmp_path / "saved")
    x, t = batch()
    with torch.no_grad():
        torch.testing.assert_close(theirs.unet.float()(x, t).sample, repaired.noise(x, t), rtol=0, atol=1e-5)
        assert not torch.allclose(ours.noise(x, t), repaired.noise(x, t), atol=1e-3)


def test_an_unchanged_model_is_saved_with_the_same_tensors(model_folder: Path, tmp_path: Path) -> None:
    save_denoiser(load_denoiser(model_folder), model_folder, tmp_path / "saved")
    before, after = load_file(model_folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_denoiser_of_another_architecture_is_not_saved(model_folder: Path, tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(layers_per_block=2), DDIMScheduler(**BETAS)).save_pretrained(tmp_path / "other")
    edited = json.loads((tmp_path / "other/model_index.json").read_text())
    assert edited["scheduler"][0] == "diffusers"
    with pytest.raises(ModelRejectedError, match="do not fit"):
        save_denoiser(load_denoiser(tmp_path / "other"), model_folder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_repair_that_diverged_is_not_saved_as_a_model(model_folder: Path, tmp_path: Path) -> None:
    ours = load_denoiser(model_folder)
    with torch.no_grad():
        next(ours.network.parameters()).fill_(float("nan"))
    with pytest.raises(ModelRejectedError, match="NaN"):
        save_denoiser(ours, model_folder, tmp_path / "saved")
