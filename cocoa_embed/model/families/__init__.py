"""What differs between families of backbones: one protocol, one file a family."""
