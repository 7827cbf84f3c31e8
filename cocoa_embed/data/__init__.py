"""Rows and tables that training, evaluation and indexing read alike."""
