"""The errors that lorascope raises.

Every message says in one line what was found, what was expected and what to do. The command line
prints it on stderr and exits with `exit_code`. Any other exception is a bug in lorascope.
"""


class LorascopeError(Exception):
    """The user's input or environment is wrong."""

    exit_code = 2


class ConfigError(LorascopeError):
    """An option, a flag or a key of a TOML file is unknown or has an impossible value."""


class AdapterError(LorascopeError):
    """The adapter or its base model is missing, damaged or of another kind than it says."""


class DatasetError(LorascopeError):
    """The texts cannot be read, or none of them can be used."""


class ArtifactError(LorascopeError):
    """An artifact is missing, damaged, from another adapter, or exists already."""


class NumberError(LorascopeError):
    """A value is not finite, or does not fit the type it is stored in."""


class ServerError(LorascopeError):
    """A language model's server cannot be reached, or does not answer as expected."""


class WorkerError(LorascopeError):
    """A process of a job failed. It has printed why, and the others were stopped."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):  # not an Exception, so that `except Exception` does not catch it
    """A signal stopped the stage. Finished work is on disk, and the next run continues."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
