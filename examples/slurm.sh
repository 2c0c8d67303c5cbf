#!/bin/bash
# A study on two machines of four GPUs each, under Slurm: `sbatch examples/slurm.sh`.
#
# The output must be on a file system that both machines share. A job that ends early, or is put
# back into the queue, is continued by the same command: finished work is kept.
#SBATCH --job-name=lorascope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -euo pipefail

adapter=${ADAPTER:?set ADAPTER to a folder or a hub id}
texts=${TEXTS:?set TEXTS to a dataset}
out=${OUT:?set OUT to a folder on the shared file system}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

on_all() { # one torchrun on each machine, which starts a process for each GPU
  srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 4 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID-$1" \
    -m lorascope "$@"
}

on_all generate --lora-path "$adapter" --dataset "$texts" --output "$out/activations"
on_all train --data-dir "$out/activations" --output "$out/sae"
on_all collect --data-dir "$out/activations" --sae "$out/sae" --output "$out/features.h5"

# The rest needs one process.
files=(--lora-path "$adapter" --data-dir "$out/activations" --sae "$out/sae")
lorascope evaluate "${files[@]}" --output "$out/evaluation.json"
lorascope label --input "$out/features.h5"
lorascope dashboard --input "$out/features.h5" --effects "$out/evaluation.json" \
  --output "$out/dashboard.html"
