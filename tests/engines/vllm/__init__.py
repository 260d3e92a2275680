"""Tests of the engines, servers and teachers by vLLM."""
