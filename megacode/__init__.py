"""megacode: a trainer for code-and-language models on Megatron-Core."""

__version__ = "0.1.0"
