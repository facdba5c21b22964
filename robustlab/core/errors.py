"""The error tree: every error says who complains, what was expected, what came instead, and what to do."""

from __future__ import annotations


class RobustlabError(Exception):
    """Base of all errors of this package.

    Args:
        who: The function, class or file that complains.
        expected: What would have been accepted.
        got: What was received instead.
        fix: What the reader can do about it, as one or more sentences.
    """

    def __init__(self, who: str, expected: str, got: str, fix: str) -> None:
        super().__init__(who, expected, got, fix)
        self.who = who
        self.expected = expected
        self.got = got
        self.fix = fix

    def __reduce__(self) -> tuple[type[RobustlabError], tuple[str, str, str, str]]:
        return type(self), (self.who, self.expected, self.got, self.fix)

    def __str__(self) -> str:
        return f"{self.who}: expected {self.expected}, got {self.got}. {self.fix}"


class ShapeError(RobustlabError, ValueError):
    """An array has the wrong number of dimensions, rows or channels."""


class RangeError(RobustlabError, ValueError):
    """A number or pixel value lies outside what is allowed."""


class LabelError(RobustlabError, ValueError):
    """Labels do not fit the task or the number of classes."""


class ConfigError(RobustlabError, ValueError):
    """An argument, or a combination of arguments, makes no sense."""


class KindError(RobustlabError, TypeError):
    """An object of the wrong kind was passed."""


class UnknownNameError(RobustlabError, KeyError):
    """A name is not in the registry, or a column or class does not exist."""


class DuplicateNameError(RobustlabError, ValueError):
    """Two things claim the same name or id."""


class NotFittedError(RobustlabError, RuntimeError):
    """Something was used before it was fitted."""


class ModelError(RobustlabError, RuntimeError):
    """A model returned something that cannot be evaluated."""


class DataFileError(RobustlabError, OSError):
    """A file or folder cannot be read or written as asked."""

    def __str__(self) -> str:
        return RobustlabError.__str__(self)


class MissingSplitError(DataFileError):
    """A data set has no such split."""


class MissingExtraError(RobustlabError, ImportError):
    """An optional dependency is not installed."""


class PluginError(RobustlabError, ImportError):
    """A third-party plugin failed to load."""


class ShadowError(RobustlabError, ImportError):
    """Another module hides one of robustlab's own packages."""


class ContractError(RobustlabError, AssertionError):
    """A user's corruption, attack, detector or defence breaks a promise that all of its kind make."""


class RobustlabWarning(UserWarning):
    """Category of all warnings of this package."""
