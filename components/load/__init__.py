"""The load stage as a component."""
