"""The command line: each command is a few lines over the API."""

from reasonvec.cli.app import main

__all__ = ["main"]
