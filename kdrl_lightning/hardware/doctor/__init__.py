"""Self-checks of a machine: small real runs of every part, each in a separate process.

``python -m kdrl_lightning doctor`` runs them and prints a table. A check is a module of ``checks/``
with a function ``run(bench)`` that yields findings.
"""
