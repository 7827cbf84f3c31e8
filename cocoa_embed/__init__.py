"""Train, export and use CoCoA multimodal embedding models."""

from importlib.metadata import version

__version__ = version("cocoa-embed")

__all__ = ["__version__"]
