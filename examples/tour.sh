#!/usr/bin/env bash
# The whole loop of preference optimisation from the command line: what docs/tour.md shows.
#
#   examples/tour.sh [FOLDER]     everything is written into FOLDER (tour_output)
#
# With FUSEDPO_REAL_DATA set to a folder with models/stories260K and
# preferences/tinystories-vs-260k.jsonl it trains that model on these stories; else a tiny model and
# its data are made on the spot. A few minutes on two cores.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-tour_output}
mkdir -p "$folder"
cd "$folder"
python "$here"/tour/data.py
export TOKENIZERS_PARALLELISM=false

PS4=$'\n$ '
set -x
fusedpo convert feedback.jsonl pairs.jsonl --to preference
fusedpo lint pairs.jsonl --tokenizer model --max-length 256 --fix clean.jsonl --fail-on never
fusedpo precompute --model model --data clean.jsonl --output refs --max-length 256 --autocast no
fusedpo train train.yaml
fusedpo plot trained --output curves.png
fusedpo diagnose trained --fail-on never
fusedpo generate held_out.jsonl --model model --n 4 --max-new-tokens 160 --batch-size 48 --output before.jsonl
fusedpo generate held_out.jsonl --model trained --n 4 --max-new-tokens 160 --batch-size 48 --output trained.jsonl
fusedpo judge trained.jsonl before.jsonl --judge judges:liked
fusedpo pairs held_out.jsonl --model trained --judge judges:liked --max-new-tokens 160 --batch-size 48 --output made
fusedpo iterate prompts.jsonl --model trained --judge judges:liked --config rounds.yaml --rounds 2 --learning-rate 3e-4,2e-4 --max-new-tokens 160 --batch-size 64 --output rounds
fusedpo generate held_out.jsonl --model rounds/round-2/training --n 4 --max-new-tokens 160 --batch-size 48 --output iterated.jsonl
fusedpo judge iterated.jsonl before.jsonl --judge judges:liked
fusedpo pathologies before.jsonl trained.jsonl iterated.jsonl --reference before.jsonl
