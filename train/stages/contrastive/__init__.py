"""Stage 3, contrastive learning on ``normalize(hidden_states[<EOS>])``, by sentence-transformers."""
