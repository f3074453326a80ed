"""The errors that moe-fx raises on purpose, and the category of its warnings.

Each error carries one message that names the thing and the way out, so that a caller (the command line, say) can show
it without a traceback. Anything else that escapes moe-fx is a bug in it.
"""

__all__ = [
    "CacheError",
    "CaptureError",
    "CheckError",
    "MissingToolchainError",
    "MoeFxError",
    "MoeFxWarning",
    "OptionError",
    "UnsupportedError",
]


class MoeFxError(Exception):
    """The base of every error that moe-fx raises on purpose."""


class OptionError(MoeFxError, ValueError):
    """An option has an unknown name or a value that it cannot take."""


class UnsupportedError(MoeFxError):
    """The model, a shape or a dtype is outside what was asked for; without `strict` the model would run unfused."""


class CaptureError(MoeFxError):
    """A graph could not be brought into the form that the passes work on."""


class CheckError(MoeFxError):
    """A result is not what it must be: a rewrite out of tolerance."""


class CacheError(MoeFxError):
    """The compile cache's directory cannot be used, or an entry in it cannot be trusted or is damaged."""


class MissingToolchainError(MoeFxError):
    """A compiler, driver or optional package that the work needs is not installed."""


class MoeFxWarning(UserWarning):
    """Something runs, but not as fast as the user may think: unfused, uncaptured, or without gradients."""
