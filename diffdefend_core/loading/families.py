"""Which pipelines may be loaded, as a table: a family is added by adding a row, and its builder in `build`.

`KarrasVePipeline` is left out: its configuration has no number of levels, and what it takes for sigma_t is sigma_t^2,
so that the levels of the training cannot be told from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffdefend_core.loading.schedule import VP_BETAS


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a pipeline: its folder, what it is for, the classes of diffusers it may be, and its files."""

    name: str
    role: str
    classes: frozenset[str]
    config: str
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: the pipeline classes that belong to it, its networks and its scheduler.

    `process` is its kind of noise levels. A pipeline class may stand in several rows; the class of the scheduler
    decides between them.
    """

    word: str
    process: str
    pipelines: frozenset[str]
    networks: tuple[Component, ...]
    scheduler: Component

    @property
    def components(self) -> tuple[Component, ...]:
        """Every part, in the order of checking."""
        return *self.networks, self.scheduler

    @property
    def schedulers(self) -> list[str]:
        """The classes that its scheduler may be of, sorted."""
        return sorted(self.scheduler.classes)


def _network(name: str, role: str, *classes: str) -> Component:
    return Component(
        name=name,
        role=role,
        classes=frozenset(classes),
        config="config.json",
        weights="diffusion_pytorch_model.safetensors",
    )


def _scheduler(*classes: str) -> Component:
    return Component(
        name="scheduler", role="the noise schedule", classes=frozenset(classes), config="scheduler_config.json"
    )


UNET = _network("unet", "the network", "UNet2DModel")
DECODER = _network("vqvae", "the decoder of the latents", "VQModel", "AutoencoderKL")

FAMILIES = (
    Family(
        word="ddpm",
        process="vp",
        pipelines=frozenset(("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")),
        networks=(UNET,),
        scheduler=_scheduler(*VP_BETAS),
    ),
    Family(
        word="flow",
        process="flow",
        pipelines=frozenset(("DDPMPipeline", "DDIMPipeline")),
        networks=(UNET,),
        scheduler=_scheduler("FlowMatchEulerDiscreteScheduler"),
    ),
    Family(
        word="ncsn",
        process="ve",
        pipelines=frozenset(("ScoreSdeVePipeline",)),
        networks=(UNET,),
        scheduler=_scheduler("ScoreSdeVeScheduler"),
    ),
    Family(
        word="consistency",
        process="consistency",
        pipelines=frozenset(("ConsistencyModelPipeline",)),
        networks=(UNET,),
        scheduler=_scheduler("CMStochasticIterativeScheduler"),
    ),
    Family(
        word="ldm",
        process="vp",
        pipelines=frozenset(("LDMPipeline",)),
        networks=(UNET, DECODER),
        scheduler=_scheduler(*VP_BETAS),
    ),
)
