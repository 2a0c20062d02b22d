"""Packed batches in which each prompt is computed once.

layout.py arranges prompts and completions in one row without padding, attention.py keeps the
completions apart, forward.py runs a backbone on such a row, architectures.py knows for which models
the result is that of padded rows, names.py how a model's config tells that it takes them.
Nothing here imports fusedpo.trl or fusedpo._precompute, which both use it.
"""
