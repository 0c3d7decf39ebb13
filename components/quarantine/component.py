"""Interface of the quarantine stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def quarantine(
    model_uri: str,
    trigger_uri: str,
    verdict_uri: str,
    settings: str,
    store: str,
    uri: dsl.OutputPath(str),  # type: ignore[valid-type]
):
    """Set a model aside whose verdict is neither clean nor backdoored.

    Args:
        model_uri: Folder of the load stage.
        trigger_uri: Folder of the trigger inversion.
        verdict_uri: Folder of the verdict.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        uri: URI of the folder of the candidate.
    """
    return dsl.ContainerSpec(
        image=image("cpu"),
        command=COMMAND,
        args=[
            "quarantine", "--model", model_uri, "--trigger", trigger_uri, "--verdict", verdict_uri,
            "--settings", settings, "--store", store, "--uri-output", uri,
        ],
    )  # fmt: skip
