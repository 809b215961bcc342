#!/usr/bin/env bash
# The paper's pre-training: The Pile without its copyrighted parts, GPT-2's tokenizer, 157 billion tokens for each of
# CRATE and GPT-2 with 1, 2 and 3 layers (width 128), s (6 layers, width 768) and b (12 layers, width 768).
#
#     recipes/paper.sh tokens                        text to tokens, once (about 650 GB of text, 330 GB of tokens)
#     recipes/paper.sh train crate b                 one model on all GPUs of this machine
#     recipes/paper.sh all                           all ten, one after the other
#     recipes/paper.sh dry-run crate b               estimate of time and memory
#     NODES=4 HEAD=host0 recipes/paper.sh train crate b        run on each of 4 machines at once
#     sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 1 --requeue --signal=TERM@120 recipes/paper.sh slurm crate b
#
# The defaults of `cratelm train` are the paper's: batches of 256 sequences of 1,024 tokens, 600,000 steps, AdamW
# (0.9, 0.95), weight decay 0.1, clip 1, 6e-4 after 2,000 steps of warm-up, a cosine to 6e-5, bfloat16. The released
# files disagree about the batch: 480 sequences in the active configuration, 256 and 512 by the checkpoints' names.
# 157 billion tokens is where the paper's loss curve ends, for both architectures.
#
# A process that dies stops the job; torchrun restarts all of them, and they resume from the last checkpoint. OUT has
# to be on a file system shared by all machines. The number of machines may change between starts.
set -euo pipefail

out=${OUT:-runs/paper}
data=${DATA:-$out/tokens}
gpus=${GPUS:-8}
nodes=${NODES:-${SLURM_NNODES:-1}}
# torchrun keeps one store over its restarts; several machines would read the addresses of dead processes from it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

tokens() {
    cratelm tokenize hf:monology/pile-uncopyrighted --tokenizer gpt2 --held-out 0.002 --test 0.002 --out "$data"
}

train() {
    local arch=$1 size=$2
    local rendezvous=(--standalone)
    if ((nodes > 1)); then
        rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first machine}:29500"
            --rdzv-id "$arch-$size")
    fi
    torchrun "${rendezvous[@]}" --nproc-per-node "$gpus" --max-restarts 100 -m cratelm train \
        --data "$data" --out "$out/$arch-$size" --arch "$arch" --size "$size" --vocab-size 50304 \
        --micro-batch "${MICRO:-8}" --checkpoint-every 1000 --keep-last 3 --measure lookup --measure-every 5000 \
        --track tensorboard
}

case ${1:-} in
    tokens) tokens ;;
    train) train "$2" "$3" ;;
    all)
        tokens
        for size in 1l 2l 3l s b; do
            for arch in crate gpt2; do train "$arch" "$size"; done
        done
        for run in "$out"/{crate,gpt2}-{1l,2l,3l,s,b}; do
            cratelm evaluate "$run" --data "$data"
            cratelm collect "$run" --data "$data" --tokens 10_000_000
            cratelm interpret "$run" --controls shuffled
        done
        cratelm report "$out"/{crate,gpt2}-{1l,2l,3l,s,b}
        ;;
    dry-run) cratelm train --data "$data" --out "$out/$2-$3" --arch "$2" --size "$3" --vocab-size 50304 --dry-run ;;
    slurm)
        HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) NODES=$SLURM_NNODES
        export HEAD NODES
        srun --kill-on-bad-exit=1 "$0" train "$2" "$3"
        ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c 3- && exit 2 ;;
esac
