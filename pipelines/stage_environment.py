"""Which variables a stage of a run on this machine gets: what it needs, and no secret that is for another stage."""

import os
from collections.abc import Mapping
from pathlib import Path

from diffdefend_core.config import Settings, without_password
from diffdefend_core.stages.attestation import KEY_VARIABLE, read_key

LOAD, REGISTER = "load", "register"
# MLflow runs under these names. The stages that compute on the model know nothing of the registry.
REGISTRY_STAGES = (LOAD, REGISTER)
KEY_FILE = "DIFFDEFEND_SIGNING__KEY_FILE"
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_CONTAINERS_GET = (
    "AWS_", "MLFLOW_", "DIFFDEFEND_S3_ENDPOINT", *CERTIFICATES, "HTTPS_PROXY", "NO_PROXY", "HF_TOKEN", "HF_ENDPOINT",
    "OMP_NUM_THREADS",
)  # fmt: skip
_SIGNING = (KEY_VARIABLE, KEY_FILE)
_HUB_SECRETS = ("HF_TOKEN",)
_REGISTRY_SECRETS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_REGISTRY_URIS = ("DIFFDEFEND_TRACKING_URI", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_CONTROLLER_SECRETS = ("DIFFDEFEND_KFP_TOKEN", "DIFFDEFEND_KFP_COOKIE", "DIFFDEFEND_WEBHOOK_SECRET")


def of_settings(settings: Settings) -> dict[str, str]:
    """Return the settings that say where to run and what may be loaded, for the stages.

    What changes a result travels as a parameter. Permissions do not: a run's parameters cannot grant them.
    """
    key_file = settings.signing.key_file
    return {
        "DIFFDEFEND_TRACKING_URI": settings.tracking_uri,
        "DIFFDEFEND_EXPERIMENT": settings.experiment,
        "DIFFDEFEND_DEVICE": settings.device,
        "DIFFDEFEND_ALLOW_PICKLES": str(settings.allow_pickles).lower(),
        "DIFFDEFEND_ALLOW_NETWORK": str(settings.allow_network).lower(),
        "DIFFDEFEND_SIGNING__VALID_DAYS": str(settings.signing.valid_days),
        KEY_FILE: str(Path(key_file).expanduser().absolute()) if key_file else "",
    }


def of_containers(settings: Settings) -> dict[str, str]:
    """Return what containers are handed of this environment, and the settings.

    The signing key goes by value, because its file is not mounted. Raises InputError if that cannot be read.
    """
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(_CONTAINERS_GET)}
    key = read_key(settings)
    if key is not None:
        handed_on[KEY_VARIABLE] = key.decode("utf-8", errors="replace")
    offline = os.environ.get("HF_HUB_OFFLINE") or str(int(not settings.allow_network))
    return {**handed_on, **of_settings(settings), KEY_FILE: "", "HF_HUB_OFFLINE": offline, "HOME": "/tmp"}


def for_stage(stage: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a stage: the registry's credentials and the Hub's where it talks to them, the key
    where it signs, nothing of the controller."""
    withheld = {*_CONTROLLER_SECRETS}
    withheld |= set() if stage == REGISTER else {*_SIGNING}
    withheld |= set() if stage == LOAD else {*_HUB_SECRETS}
    withheld |= set() if stage in REGISTRY_STAGES else {*_REGISTRY_SECRETS}
    kept = {name: value for name, value in environment.items() if name not in withheld}
    if stage in REGISTRY_STAGES:
        return kept
    return kept | {name: without_password(kept[name]) for name in _REGISTRY_URIS if name in kept}
