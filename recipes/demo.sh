#!/usr/bin/env bash
# What `cratelm demo` does, one command per step: CRATE-2L against GPT-2-2L on the Python standard library's own text.
# Each step goes on where it was stopped, so the whole script may be interrupted and run again.
set -euo pipefail

out=${1:-runs/by-hand}

cratelm tokenize stdlib --out "$out/tokens"
for arch in crate gpt2; do
    run="$out/$arch-2l"
    cratelm train --data "$out/tokens" --out "$run" --arch "$arch" --size 2l
    cratelm evaluate "$run" --data "$out/tokens"
    cratelm collect "$run" --data "$out/tokens"
    cratelm interpret "$run"
done
cratelm report "$out/crate-2l" "$out/gpt2-2l"
