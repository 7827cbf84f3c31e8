"""The demo: scenes that the project draws, the captioner it starts from, and the whole story in one command."""
