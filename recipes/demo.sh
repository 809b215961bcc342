#!/usr/bin/env bash
# What `cratelm demo` does, one command per step: CRATE-2L against GPT-2-2L on the Python standard library's own text.
# Each step resumes where it was stopped, so you can interrupt the script and run it again.
set -euo pipefail

out=${1:-runs/by-hand}
models=("$out/crate-2l" "$out/gpt2-2l")
controls=("$out/crate-2l-random" "$out/gpt2-2l-random")

cratelm tokenize stdlib --out "$out/tokens" --tokenizer bpe:4096 --held-out 0.2
for arch in crate gpt2; do
    cratelm train --data "$out/tokens" --out "$out/$arch-2l" --arch "$arch" --size 2l --tokens 1228800 \
        --batch-tokens 2048 --micro-batch 8 --context 256 --learning-rate 3e-3 --final-learning-rate 3e-4 \
        --warmup-steps 40 --evaluate-every 100 --evaluate-tokens 16384 --checkpoint-every 100
    cratelm train --control-of "$out/$arch-2l" --out "$out/$arch-2l-random"
done
cratelm evaluate "${models[@]}" "${controls[@]}" --data "$out/tokens"
cratelm collect "${models[@]}" "${controls[@]}" --data "$out/tokens"
cratelm interpret "${models[@]}" --controls shuffled
cratelm interpret "${controls[@]}"
cratelm report "${models[@]}" "${controls[@]}" --out "$out/report"
