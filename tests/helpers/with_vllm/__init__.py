"""Models, servers and engines of tests that need vLLM, or stand in for it."""
