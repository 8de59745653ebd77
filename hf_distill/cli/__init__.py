"""The command line, `hf-distill`."""

from hf_distill.cli.commands import app, main

__all__ = ["app", "main"]
