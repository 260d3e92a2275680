"""The checks of ``doctor``: each module has a function ``run`` that yields findings."""
