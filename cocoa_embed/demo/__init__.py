"""The demo: drawn scenes, the captioner it starts from, and training, export, search and report in one command."""
