"""Scaling laws for inference-efficient language models.

The modules are imported by name (``from morphlib import fitting``); importing the package itself
loads none of them.
"""

__version__ = "0.1.0"
