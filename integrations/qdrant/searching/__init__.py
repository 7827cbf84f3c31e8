"""Search a collection: filters, queries by text, image and example, and pages of hits."""
