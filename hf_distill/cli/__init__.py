"""The command line, `hf-distill`."""

from hf_distill.cli.main import app, main

__all__ = ["app", "main"]
