"""The self-check of a machine: small real runs of every part, each in a separate process.

``python -m kdrl_lightning doctor`` prints its table. A check is a module of this folder with a
function ``run(bench)`` that yields findings.
"""
