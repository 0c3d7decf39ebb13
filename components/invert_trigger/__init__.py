"""The invert_trigger stage as a component."""
