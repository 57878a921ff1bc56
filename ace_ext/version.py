"""The version of ace_ext. The build reads it too."""

__version__ = "0.2.0.dev0"
