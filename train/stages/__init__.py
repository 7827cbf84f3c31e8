"""The three stages."""
