"""What differs between families of backbones: one interface, and one file per family."""
