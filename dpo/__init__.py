"""Direct Preference Optimization: the machinery below train.py."""

__version__ = "1.0.0"
