"""Load any image source as upright RGB, and find image files."""
