#!/usr/bin/env bash
# demo.sh: what `make demo` shows: text found on this machine becomes token shards, a small GPT-2 learns from them with
# Flora and the fused backward pass, the loss becomes a picture, and the model writes some text. The run is under
# runs/demo; STEPS and MODEL change it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
run=runs/demo

say() { printf '\n== %s\n' "$*"; }

rm -rf "$run"
say "./train_gpt2 --optimizer flora --rank 256 --gradients fused (Ctrl-C ends it early and keeps a checkpoint)"
./train_gpt2 --optimizer flora --rank 256 --gradients fused --model "${MODEL:-small}" --steps "${STEPS:-400}" \
  --eval-every 100 --checkpoint-every 100 --out "$run"

say "the loss as a picture: $run/loss.png"
"$python" scripts/plot_metrics.py "$run" -o "$run/loss.png" --smooth 10 --title "Flora, rank 256, fused backward pass"

say "a sample from $run/latest"
./train_gpt2 generate --model "$run/latest" --prompt "The " --sample-tokens 240
