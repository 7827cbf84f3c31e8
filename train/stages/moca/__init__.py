"""MoCa's pre-training (arXiv 2506.23115): masked language modelling and masked auto-encoding in one sequence."""
