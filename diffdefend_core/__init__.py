"""DiffDefend: keep backdoored diffusion models out of production."""

__version__ = "0.1.0"
