"""Interface of the detect stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def detect(
    model_uri: str,
    trigger_uri: str,
    settings: str,
    store: str,
    uri: dsl.OutputPath(str),  # type: ignore[valid-type]
    word: dsl.OutputPath(str),  # type: ignore[valid-type]
):
    """Say whether the model carries a backdoor, by what it does under the inverted trigger.

    Args:
        model_uri: Folder of the load stage.
        trigger_uri: Folder of the trigger inversion.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        uri: URI of the folder of the verdict.
        word: The verdict as a closed word: `clean`, `backdoored` or `inconclusive`.
    """
    return dsl.ContainerSpec(
        image=image("gpu"),
        command=COMMAND,
        args=[
            "detect", "--model", model_uri, "--trigger", trigger_uri, "--settings", settings, "--store", store,
            "--uri-output", uri, "--word-output", word,
        ],
    )  # fmt: skip
