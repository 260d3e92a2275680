"""Models, servers and engines for tests that need vLLM or a stand-in for it."""
