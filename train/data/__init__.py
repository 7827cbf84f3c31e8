"""Rows: where they come from, how they are checked, mixed and drawn."""
