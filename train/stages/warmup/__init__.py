"""Stage 1, warm-up: the model learns bidirectional attention by reconstructing text and pixels jointly."""
