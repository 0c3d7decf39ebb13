"""Which pipelines may be loaded, as a table: a family is added by adding a row, and its builder in `build`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a pipeline: its folder and the classes of diffusers it may be."""

    name: str
    classes: frozenset[str]
    config: str
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: the pipeline classes that belong to it, its network and its scheduler."""

    word: str
    pipelines: frozenset[str]
    network: Component
    scheduler: Component

    @property
    def components(self) -> tuple[Component, ...]:
        """Every part, in the order of checking."""
        return self.network, self.scheduler


UNET = Component(
    name="unet",
    classes=frozenset(("UNet2DModel",)),
    config="config.json",
    weights="diffusion_pytorch_model.safetensors",
)

FAMILIES = (
    Family(
        word="ddpm",
        pipelines=frozenset(("DDPMPipeline", "DDIMPipeline")),
        network=UNET,
        scheduler=Component(
            name="scheduler",
            classes=frozenset(("DDPMScheduler", "DDIMScheduler")),
            config="scheduler_config.json",
        ),
    ),
)
