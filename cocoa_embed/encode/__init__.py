"""Embed texts and images with a SentenceTransformer, images in batches that are prepared ahead."""
