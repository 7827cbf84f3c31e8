"""What a run needs and costs, checked before it begins."""
