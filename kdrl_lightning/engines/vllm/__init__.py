"""vLLM as an engine, in the training process or on servers."""
