"""Build a backbone from parts: a Qwen2-VL trained as a causal captioner of drawn scenes or of an image folder."""
