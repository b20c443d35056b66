#!/usr/bin/env bash
# demo.sh: what `make demo` shows: text becomes token shards, a small GPT-2 learns from them for about three minutes with
# Flora and the fused backward pass, writes some text before, halfway and after, and the loss becomes a picture.
#
# The text is the King James Bible that the program `bible` (package bible-kjv) knows; without it, what train_gpt2 finds on
# the machine. The run is under runs/demo. TRAIN_SECONDS=number, or STEPS=number, and MODEL=preset change it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
seconds=${TRAIN_SECONDS:-150}
max_steps=15000 # about one epoch of the Bible: a faster machine needs less time
run=runs/demo
speed=runs/demo-speed
text=data/demo

say() { printf '\n== %s\n' "$*"; }

rm -rf $run $speed

# ---- the text: a chapter is a document, a byte a token; the hash of a chapter decides whether it is held out

# The program's lines are "Ge1:1 In the beginning God created ...".
king_james() {
  bible -f Gen1:1-Rev22:21 </dev/null | awk '
    $1 !~ /^[1-3]?[A-Za-z]+[0-9]+:[0-9]+$/ { unknown = 1; exit }
    { split($1, place, ":"); sub(/^[^ ]+ /, "") }
    NR > 1 && place[1] != chapter { print "<|endoftext|>" }
    { chapter = place[1]; print }
    END { exit unknown || NR == 0 }'
}

if [ ! -e $text/king_james_val_000000.bin ] && command -v bible >/dev/null; then
  say "the King James Bible of the package bible-kjv becomes token shards: $text"
  mkdir -p $text
  if king_james >$text/king_james.txt; then
    "$python" data/prepare.py $text/king_james.txt --out $text --tokenizer bytes --val-fraction 0.02
  else
    echo "the program 'bible' prints something else; going on with other text"
  fi
fi
flags=(--optimizer flora --rank 32 --matrix-lr-scale 0.3 --gradients fused --dtype fp32 --seq-len 64 --micro-batch 4)
flags+=(--model "${MODEL:-scripts/demo_model.json}")
prompt="The "
if [ -e $text/king_james_val_000000.bin ]; then
  flags+=(--data "$text/king_james_train_*.bin")
  prompt="And the LORD said"
fi

# ---- as many steps as there is time for

steps=${STEPS:-}
if [ -z "$steps" ]; then
  say "how fast this machine is"
  ./train_gpt2 "${flags[@]}" --steps 80 --eval-every 0 --checkpoint-every 0 --log-every 80 --out $speed | grep '^step 80'
  steps=$(PYTHONPATH=scripts "$python" -c '
import statistics, sys
from metrics_file import read_metrics
run, seconds, max_steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
milliseconds = statistics.median(row["step_ms"] for row in read_metrics(run).rows[20:])
print(max(100, min(int(1000 * seconds / milliseconds) // 100 * 100, max_steps)))' $speed "$seconds" $max_steps)
  rm -rf $speed
  echo "$steps steps: what it makes in $seconds seconds, and $max_steps at most"
fi

# ---- training

# The validation loss is that of all chapters held out.
flags+=(--steps "$steps" --eval-batches 320 --eval-every $((steps / 4 + 1)) --log-every $((steps / 20 + 1)))
flags+=(--sample-every $((steps / 2 + 1)) --prompt "$prompt" --sample-tokens 200 --temperature 0.7 --top-p 0.9)
say "./train_gpt2 $(printf '%q ' "${flags[@]}")--out $run"
echo "Ctrl-C ends it early and keeps a checkpoint; ./train_gpt2 --resume $run goes on"
./train_gpt2 "${flags[@]}" --out $run

say "the loss as a picture: $run/loss.png"
"$python" scripts/plot_metrics.py $run -o $run/loss.png --smooth 20 --title "Flora, rank 32, fused backward pass"

say "more text: ./train_gpt2 generate --model $run/latest --prompt '$prompt' --sample-tokens 600 --temperature 0.7 --top-p 0.9"
./train_gpt2 generate --model $run/latest --prompt "$prompt" --sample-tokens 600 --temperature 0.7 --top-p 0.9
