"""Stage 2, bridge: the model reconstructs block B through ``<EOS>`` alone."""
