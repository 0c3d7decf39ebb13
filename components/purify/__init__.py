"""The purify stage as a component."""
