"""What runs on the device: copied into every bundle, and importable here for its tests.

Python 3.8, its standard library, and the module of a runtime (`tensorrt` of JetPack); nothing else, not even NumPy.
"""

from __future__ import annotations

from .deployed import Deployed
from .folder import BundleError

__all__ = ["BundleError", "Deployed"]
