"""Interface of the load stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def load(source: str, settings: str, store: str, name: str, uri: dsl.OutputPath(str)):  # type: ignore[valid-type]
    """Fetch a model, refuse what may not be loaded, and publish the copy that all later stages use.

    Args:
        source: Where the model is: `s3://`, `file://` or `models:/` URI.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        name: Name of the model in reports and registry; empty for one derived from the source.
        uri: URI of the load folder.
    """
    return dsl.ContainerSpec(
        image=image("cpu"),
        command=COMMAND,
        args=[
            "load", "--source", source, "--name", name, "--settings", settings, "--store", store, "--uri-output", uri,
        ],
    )  # fmt: skip
