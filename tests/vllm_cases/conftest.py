"""What pytest must not import here: a plugin that vLLM loads, in its own processes."""

collect_ignore = ["store_transfer.py"]
