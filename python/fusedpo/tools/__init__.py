"""What surrounds a training: data checks, conversion, runs, plots, judging. Nothing else of fusedpo
imports this, and each tool says which extra it needs."""
