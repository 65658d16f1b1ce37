"""The error family. Every message says what came, what was expected, whose it is, and what to do."""

from __future__ import annotations


class KVPolicyError(Exception):
    """Root of all errors raised on purpose by kvpolicy; the command line turns them into exit code 2."""


class BudgetError(KVPolicyError):
    """A budget, a capacity table or shares that cannot be honoured."""


class PlanError(KVPolicyError):
    """A plan file that is damaged, of another version, or made for another model."""


class ModelError(KVPolicyError):
    """A model that is not found, cannot be read, or whose attention cannot be reached."""


class TextError(KVPolicyError):
    """Calibration text that is missing, unreadable or too short."""


class PluginError(KVPolicyError):
    """A plugin that is unknown, broken, or does not honour its role."""


class PluginConflictError(PluginError):
    """Two distributions offer one name in one role."""


class StudyError(KVPolicyError):
    """A search that cannot be started or resumed with the given settings."""


class PluginWarning(UserWarning):
    """A plugin was left out; everything else works."""


class PlanWarning(UserWarning):
    """A plan is used outside the conditions it was made for."""


class GraphWarning(UserWarning):
    """Decoding is slower than asked for: it could not be compiled, or not be captured in a CUDA graph."""
