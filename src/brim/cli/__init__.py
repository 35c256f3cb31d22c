"""The command ``brim``: train, predict, info. Nothing heavy is imported before a command needs it."""

from brim.cli.app import main

__all__ = ["main"]
