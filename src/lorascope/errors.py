"""What can go wrong, by whose mistake it is.

Every message says what was found, what was expected and what to do, in one line. The CLI prints
it on stderr and exits with `exit_code`; anything that is not a `LorascopeError` is a defect.
"""


class LorascopeError(Exception):
    """The user's input or environment is wrong; nothing was written."""

    exit_code = 2


class ConfigError(LorascopeError):
    """An option, a flag or a key of a TOML file is unknown or has an impossible value."""


class AdapterError(LorascopeError):
    """The adapter, or the base model under it, is missing, broken or not what it claims."""


class DatasetError(LorascopeError):
    """The texts cannot be read or hold nothing to use."""


class ArtifactError(LorascopeError):
    """A file of the pipeline is missing, damaged, of another adapter, or already there."""


class NumberError(LorascopeError):
    """A value is not finite, or does not fit the type that it has to be stored in."""


class WorkerError(LorascopeError):
    """A process of a job failed; it has said why, and the others were stopped."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):  # BaseException: no `except Exception` may swallow it
    """A signal asked the stage to stop; finished work is on disk and a re-run continues."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number
