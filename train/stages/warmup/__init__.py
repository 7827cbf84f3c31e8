"""Stage 1, warm-up: bidirectional attention by joint reconstruction of text and pixels."""
