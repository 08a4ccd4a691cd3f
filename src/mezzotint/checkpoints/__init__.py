"""Models on disk."""

from mezzotint.checkpoints import folder

__all__ = ["folder"]
