"""Embed texts and images with a SentenceTransformer; images stream through it in batches prepared ahead."""
