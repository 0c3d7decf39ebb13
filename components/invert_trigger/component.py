"""Interface of the trigger inversion stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def invert_trigger(model_uri: str, settings: str, store: str, uri: dsl.OutputPath(str)):  # type: ignore[valid-type]
    """Search the trigger that a backdoored model would answer to.

    Args:
        model_uri: Folder of the load stage.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        uri: URI of the folder of the inverted trigger.
    """
    return dsl.ContainerSpec(
        image=image("gpu"),
        command=COMMAND,
        args=["invert-trigger", "--model", model_uri, "--settings", settings, "--store", store, "--uri-output", uri],
    )
