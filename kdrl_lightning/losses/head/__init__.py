"""Log-probabilities from hidden states and a language-model head, in chunks, with gradients."""
