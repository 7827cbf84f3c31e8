"""Stage 2, bridge: block B is reconstructed through ``<EOS>`` alone."""
