"""Runs rewards safely: the runner, worker processes with time limits, and the sandbox."""
