"""Tests of engines, servers and teachers that run on vLLM."""
