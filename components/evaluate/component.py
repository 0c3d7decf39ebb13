"""Interface of the evaluate stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def evaluate(candidate_uri: str, settings: str, store: str, uri: dsl.OutputPath(str)):  # type: ignore[valid-type]
    """Measure quality and attack success of the candidate, and of the model before repair.

    Args:
        candidate_uri: Folder of the branch: keep, purify or quarantine.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        uri: URI of the folder of the scorecard.
    """
    return dsl.ContainerSpec(
        image=image("gpu"),
        command=COMMAND,
        args=["evaluate", "--candidate", candidate_uri, "--settings", settings, "--store", store, "--uri-output", uri],
    )
