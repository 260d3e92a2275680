"""A package, so that pytest does not put this folder on the path: ``vllm`` in it is not vLLM."""
