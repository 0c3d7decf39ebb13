"""The errors that DiffDefend raises on purpose.

Each message says what was found, what was expected and what to do, on one line. Each class is also
a subclass of the builtin that a caller would expect. The command line turns all of them into exit code 2.
"""


class DiffDefendError(Exception):
    """Base of every error raised on purpose; `found`, `expected` and `action` make up its one line."""

    def __init__(self, found: str, *, expected: str, action: str) -> None:
        self.found, self.expected, self.action = found, expected, action
        super().__init__(f"{found}; expected {expected}; {action}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.expected, self.action)


def _rebuild(kind: type[DiffDefendError], found: str, expected: str, action: str) -> DiffDefendError:
    return kind(found, expected=expected, action=action)


class InputError(DiffDefendError, ValueError):
    """Raised when an argument, a setting or a named thing that the user gave is wrong or missing."""


class ModelRejectedError(DiffDefendError, ValueError):
    """Raised when a model folder is not one that may be loaded: format, class, shape, or content."""


class ArtifactError(DiffDefendError, ValueError):
    """Raised when an artifact between stages is missing, altered, incomplete or of a newer major version."""


class StoreError(DiffDefendError, OSError):
    """Raised when the object store cannot be reached, refuses, or loses a transfer after all retries."""


class RegistryError(DiffDefendError, RuntimeError):
    """Raised when the model registry cannot be reached or does not hold what was named."""


class MissingExtraError(DiffDefendError, ImportError):
    """Raised when an optional dependency is absent; the message names the extra to install."""


def numpy_reason(error: Exception) -> str:
    """Return why numpy could not read a file, without its advice to unpickle what cannot be read otherwise."""
    if "pickle" in str(error):
        return "it is no array of numbers; pickled objects are never loaded"
    return str(error)
