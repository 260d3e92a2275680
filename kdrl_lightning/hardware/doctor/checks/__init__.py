"""The checks of the doctor: each module has a function ``run`` that yields findings."""
