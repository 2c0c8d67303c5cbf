"""The version of lorascope."""

__version__ = "0.1.0"
