"""The Dockerfile and the compose file as documents: what can be said of them without a daemon."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def test_the_dockerfile_needs_no_buildkit() -> None:
    assert not re.search(r"^# *syntax=|--mount=|<<[A-Z-]|COPY --(link|chmod)|RUN --", DOCKERFILE, re.MULTILINE)


def test_every_image_ends_as_a_numeric_user() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    base = next(stage for stage in stages if stage.startswith("${BASE} AS base\n"))
    images = [stage for stage in stages if stage.startswith("base AS ")]
    assert re.search(r"^USER 10001:10001$", base, re.MULTILINE)
    assert not any(re.search(r"^USER", stage, re.MULTILINE) for stage in images)
    assert [stage.split()[2] for stage in images] == ["cpu", "gpu", "mlflow", "worker"]


def test_a_builder_that_builds_all_stages_above_the_target_builds_no_torch_for_cpu() -> None:
    above = DOCKERFILE.partition("FROM base AS cpu\n")[0]
    assert "AS build-cpu" in above and "torch" not in above.partition("FROM")[2]


def test_every_install_is_pinned() -> None:
    installs = re.findall(r"pip install [^\n]*", DOCKERFILE)
    assert len(installs) == 5 and all("-c constraints.txt" in line for line in installs)


def test_the_stack_holds_no_credential_and_names_its_images() -> None:
    stack = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert set(stack["services"]) == {"s3", "postgresql", "mlflow", "worker"}
    for name, service in stack["services"].items():
        assert re.search(r":[\w.-]*\d[\w.-]*$", service["image"]), name
        for variable, value in service["environment"].items():
            if re.search(r"KEY|SECRET|PASSWORD", variable):
                assert re.fullmatch(r"\$\{DIFFDEFEND_\w+:\?.*\}", value), (name, variable)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for name in ("s3", "mlflow", "worker"):
        assert stack["services"][name]["read_only"] and stack["services"][name]["cap_drop"] == ["ALL"]
