"""The version of this package, which runs and checkpoints name."""

__version__ = "0.1.0"
