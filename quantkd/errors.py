"""The errors that quantkd raises. Each says what was found, what was expected and what to do."""

from __future__ import annotations


class QuantKDError(Exception):
    """Base of all errors that quantkd raises."""


class ConfigError(QuantKDError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class DataError(QuantKDError, ValueError):
    """Prompts or rows that cannot be used: missing, empty, malformed, too long."""


class TransferSetError(QuantKDError, ValueError):
    """A transfer set that is damaged, unfinished, or does not fit the student."""


class TeacherError(QuantKDError, RuntimeError):
    """A teacher whose output cannot be stored, such as logits that are not finite."""


class HubError(QuantKDError, ConnectionError):
    """The Hub could not be reached, or refused a request."""


class MissingDependencyError(QuantKDError, ImportError):
    """An optional package is missing that the requested feature needs."""
