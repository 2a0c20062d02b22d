"""Reference log-probs of a data set, computed once into a store; see `run.precompute`.

identity.py says what a reference is, data.py and records.py what is to be scored and in which
batches, reference.py and scoring.py how, filling.py does it; nothing here imports fusedpo.trl.
"""
