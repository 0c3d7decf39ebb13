"""The measured claims of DiffDefend: every figure in docs/results.md is printed by a module here."""
