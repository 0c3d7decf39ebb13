"""The keep stage as a component."""
