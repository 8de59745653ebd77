"""The one kind of error that is the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """What came, why it matters and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """
