"""Every error cascache raises on purpose, grouped by what the reader would do about it.

    CascacheError
    ├── ConfigError (ValueError)        fix the settings
    ├── DataError (ValueError)          fix the input
    ├── EngineError (RuntimeError)      fix the teacher's environment
    │   └── EngineStopped               it died while computing: run the same command again
    ├── CacheError (OSError)            the cache on disk
    │   ├── PartMissing                 dump that part
    │   └── PartCorrupt                 dump that part again
    ├── MismatchError (ValueError)      two healthy things that do not fit
    └── TrainingError (RuntimeError)    the run itself broke: a NaN, a lost worker

A message says what was found, what was wanted, where, and what to do next.
"""


class CascacheError(Exception):
    """Root of the tree; command lines print it without a traceback and exit with 2."""


class ConfigError(CascacheError, ValueError):
    """A setting is unknown, out of range or contradicts another: fix the settings."""


class DataError(CascacheError, ValueError):
    """A sample or image cannot be used: fix the input. Carries a one-word `reason`."""

    def __init__(self, message: str, *, reason: str = "data") -> None:
        """Store the message and the word that quarantine counts by."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Stay picklable with the keyword: worker processes raise it too."""
        return (_data_error, (str(self), self.reason))


def _data_error(message: str, reason: str) -> DataError:
    return DataError(message, reason=reason)


class EngineError(CascacheError, RuntimeError):
    """The teacher's engine is missing, untested or answered wrongly."""


class EngineStopped(EngineError):
    """A started engine died or failed while computing; sealed parts are kept."""


class CacheError(CascacheError, OSError):
    """Something about a cache on disk."""


class PartMissing(CacheError):
    """A part is not sealed: dump it."""


class PartCorrupt(CacheError):
    """A part's bytes are not what was sealed: dump it again."""


class MismatchError(CascacheError, ValueError):
    """Two healthy things that do not fit each other; the message names the differing fields."""


class TrainingError(CascacheError, RuntimeError):
    """The run cannot continue: a loss is not finite, or a checkpoint belongs to another recipe."""


def quote(value: object, limit: int = 80) -> str:
    """What a message quotes of a user's input: its `repr`, cut in the middle where it is long."""
    return shorten(repr(value), limit)


def shorten(text: str, limit: int = 400) -> str:
    """Foreign text for one line of a message: no line breaks, cut in the middle where it is long."""
    text = " ".join(text.split())
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def tell_os_error(error: OSError) -> str:
    """One line that describes an operating system error, for a command line."""
    if error.errno is None:  # not of the system: libraries raise it with their own reasons
        return shorten(str(error)) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; choose a place that exists, has room and can be written"
