"""What may go wrong, by exit code."""

from __future__ import annotations


class LoralignError(Exception):
    """Bad input or an impossible combination, said in one sentence with the mend (exit code 2)."""


class WorkFailed(LoralignError):
    """The work itself failed: diverged, out of disk, a method that did not act (exit code 1)."""


class VerificationFailed(LoralignError):
    """A written adapter does not compute what it should (exit code 3)."""
