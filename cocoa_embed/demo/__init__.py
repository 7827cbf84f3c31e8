"""The demo: drawn scenes, the captioner it starts from, and training, export, search and report in one command."""

MARKER = ".cocoa-demo"
"""Marks the demo's working folder."""
