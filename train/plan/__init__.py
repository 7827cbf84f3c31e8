"""Check what a run needs, and estimate what it costs, before it begins."""
