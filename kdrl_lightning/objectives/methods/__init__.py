"""Methods built for a teacher with its own prompt, a self-teacher or a second anchor.

Each file holds one method as its paper publishes it: the parts that only this method has, and the
preset. They take any teacher. ``mixtures`` holds SRPO and RLSD in the form with an external one.
"""
