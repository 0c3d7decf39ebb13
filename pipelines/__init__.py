"""The pipelines: the gate for one model, compiled for a cluster or run on this machine."""
