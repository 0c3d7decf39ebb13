"""The stages as Kubeflow Pipelines components: interfaces only.

Each `component.py` states the typed inputs and outputs of one stage, its image and its command line. What a stage does
is in `diffdefend_core`. Models, triggers and reports travel by URI: every output is the URI of a finished folder whose
name is the digest of its inputs, the settings and the code, so the URIs and `settings` are a complete cache key.
"""
