"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import logging
import os


class InputError(ValueError):
    """What came, why it matters and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


def warn_once(message: str, *values: object) -> None:
    """A warning of all processes, said by the first."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("hf_distill").warning(message, *values)
