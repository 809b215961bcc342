#!/usr/bin/env bash
# The paper's comparison on a folder of your own text, .jsonl.zst files in The Pile's schema ({"text", "meta"}) or any
# other source of `cratelm tokenize`: CRATE against GPT-2 with 1, 2 and 3 layers, three seeds, equal tokens.
#
#     recipes/minipile.sh FOLDER [OUT] [TOKENS]
#
# `cratelm study ... --dry-run` estimates the time; every step resumes where it was stopped.
set -euo pipefail

text=${1:?name a folder with text}
out=${2:-runs/minipile}
tokens=${3:-30_000_000}

cratelm tokenize "$text" --tokenizer bpe:8192 --held-out 0.1 --out "$out/tokens"
cratelm study --data "$out/tokens" --out "$out/study" --sizes 1l,2l,3l --seeds 3 --tokens "$tokens" \
    --context 256 --batch-tokens 8192 --micro-batch 16 --learning-rate 2e-3 --final-learning-rate 2e-4 \
    --warmup-steps 200 --checkpoint-every 500 --evaluate-every 500 --collect-tokens 3_000_000
