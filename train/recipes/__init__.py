"""Recipes: YAML files, one a run. ``cocoa-embed train NAME`` looks here first."""
