"""One indexing run: records become points, points are merged with those of other runs, deleted files are pruned."""
