"""Writes captions and question-answer pairs of images: with a causal vision-language model, or by an endpoint."""
