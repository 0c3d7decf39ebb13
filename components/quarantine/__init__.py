"""The quarantine stage as a component."""
