"""The detect stage as a component."""
