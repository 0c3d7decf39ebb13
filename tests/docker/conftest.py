"""The built images, once for all tests of this folder. They stay, so that the next run finds docker's cache."""

from __future__ import annotations

import pytest
from docker_images import build, why_not


@pytest.fixture(scope="session")
def can_build() -> None:
    """Skips without a docker daemon or a base image."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cpu_image(can_build: None) -> str:
    """The image of the stages without torch."""
    return build("cpu")


@pytest.fixture(scope="session")
def gpu_image(can_build: None) -> str:
    """The image of the stages that compute."""
    return build("gpu")
