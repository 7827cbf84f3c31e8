"""Data that training, evaluation and indexing read alike: tables, image folders, pairs and the names of MMEB."""
