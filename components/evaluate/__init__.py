"""The evaluate stage as a component."""
