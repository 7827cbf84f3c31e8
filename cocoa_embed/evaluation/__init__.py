"""How good a model is: on MMEB-V1, and on pairs of one's own."""
