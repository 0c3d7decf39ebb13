"""The gate for one model: load, invert, detect, then keep, purify or set aside, then evaluate and register."""

from collections.abc import Callable
from typing import NamedTuple

from kfp import dsl

from components.detect.component import detect
from components.evaluate.component import evaluate
from components.invert_trigger.component import invert_trigger
from components.keep.component import keep
from components.load.component import load
from components.purify.component import purify
from components.quarantine.component import quarantine
from components.register.component import register
from pipelines.placement import MLFLOW_READ_SECRET, MLFLOW_SECRET, Placement

NAME = "diffdefend-gate"


class GateOutputs(NamedTuple):
    """What a run of the gate leaves: the folders of the last stages and two closed words."""

    gate_uri: str
    scorecard_uri: str
    candidate_uri: str
    verdict_uri: str
    word: str
    outcome: str


def treat_pipeline(placement: Placement) -> Callable[..., dsl.PipelineTask]:
    """Return the branch as a pipeline of its own.

    The word is an *input* here because a lone condition on a component's named output is silently skipped by kfp.local.
    It fails closed: only `clean` keeps, only `backdoored` repairs, any other word sets the model aside.
    """

    @dsl.pipeline(name="treat")
    def treat(word: str, model_uri: str, trigger_uri: str, verdict_uri: str, settings: str, store: str) -> str:
        inputs = {
            "model_uri": model_uri,
            "trigger_uri": trigger_uri,
            "verdict_uri": verdict_uri,
            "settings": settings,
            "store": store,
        }
        with dsl.If(word == "clean"):
            kept = placement.light(keep(**inputs))
        with dsl.Elif(word == "backdoored"):
            purified = placement.heavy(purify(**inputs))
        with dsl.Else():
            aside = placement.light(quarantine(**inputs))
        return dsl.OneOf(kept.outputs["uri"], purified.outputs["uri"], aside.outputs["uri"])

    return treat


def gate_pipeline(
    placement: Placement = Placement(),  # noqa: B008 (frozen)
    science: str = "",
) -> Callable[..., dsl.PipelineTask]:
    """Return the gate as a pipeline, its tasks placed by `placement`; `science` is the default of its `settings`."""
    treat = treat_pipeline(placement)

    @dsl.pipeline(
        name=NAME,
        description="Scan a diffusion model for backdoors, repair it, and gate its promotion.",
        pipeline_config=placement.pipeline_config(),
    )
    def gate(source: str, settings: str = science, store: str = "", name: str = "") -> GateOutputs:
        both = {"settings": settings, "store": store}
        loaded = placement.light(load(source=source, name=name, **both), registry=MLFLOW_READ_SECRET, weights=True)
        model_uri = loaded.outputs["uri"]
        inverted = placement.heavy(invert_trigger(model_uri=model_uri, **both))
        trigger_uri = inverted.outputs["uri"]
        found = placement.heavy(detect(model_uri=model_uri, trigger_uri=trigger_uri, **both))
        word, verdict_uri = found.outputs["word"], found.outputs["uri"]
        treated = treat(word=word, model_uri=model_uri, trigger_uri=trigger_uri, verdict_uri=verdict_uri, **both)
        measured = placement.heavy(evaluate(candidate_uri=treated.output, **both))
        scorecard_uri = measured.outputs["uri"]
        decision = register(candidate_uri=treated.output, scorecard_uri=scorecard_uri, name=name, **both)
        decided = placement.signing(placement.light(decision, registry=MLFLOW_SECRET))
        return GateOutputs(
            gate_uri=decided.outputs["uri"],
            scorecard_uri=scorecard_uri,
            candidate_uri=treated.output,
            verdict_uri=verdict_uri,
            word=word,
            outcome=decided.outputs["outcome"],
        )

    return gate
