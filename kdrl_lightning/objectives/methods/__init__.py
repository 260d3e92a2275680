"""Presets of further papers, most of them on self-teachers or teachers with their own prompt.

Each file holds one method as its paper publishes it: the preset, and the parts that only this
method has. All methods work with any teacher. ``mixtures`` holds SRPO and RLSD as a replication
changed them for an external teacher.
"""
