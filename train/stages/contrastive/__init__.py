"""Stage 3, contrastive learning on ``normalize(hidden[<EOS>])``, by sentence-transformers."""
