"""Training rows: read from their sources, checked, mixed and drawn."""
