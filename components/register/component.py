"""Interface of the register stage."""

from kfp import dsl

from components.image import COMMAND, image


@dsl.container_component
def register(
    candidate_uri: str,
    scorecard_uri: str,
    settings: str,
    store: str,
    name: str,
    uri: dsl.OutputPath(str),  # type: ignore[valid-type]
    outcome: dsl.OutputPath(str),  # type: ignore[valid-type]
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Apply the gate's rules, tell the model registry, and write the report.

    Args:
        candidate_uri: Folder of the branch: keep, purify or quarantine.
        scorecard_uri: Folder of the evaluation.
        settings: Seed and options as one line of JSON.
        store: URI of the artifact store; empty for `DIFFDEFEND_STORE`.
        name: Registered name of the model; empty for the one that the load stage found.
        uri: URI of the folder of the gate's decision.
        outcome: The decision as a closed word: `promoted`, `repaired` or `quarantined`.
        report: The report, one HTML file without outside assets.
        metrics: The measured values, for the table of the run.
    """
    return dsl.ContainerSpec(
        image=image("cpu"),
        command=COMMAND,
        args=[
            "register", "--candidate", candidate_uri, "--scorecard", scorecard_uri, "--name", name,
            "--settings", settings, "--store", store, "--uri-output", uri, "--outcome-output", outcome,
            "--report-output", report.path, "--metrics-output", metrics.path,
            "--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )  # fmt: skip
