#!/usr/bin/env bash
# Seeds × layers, one pair in each task, where DIB takes longer than training: every task trains the network of its
# seed and measures DIB in one layer. On a GPU add --deterministic: without it the tasks of a seed do not get the same
# network. Submitted again, the same line does what is not done yet, and the last task leaves the means of all.
#     sbatch slurm/array.sh -m ResNet -d CIFAR10
# For seeds alone, slurm/run.sh says how; it also explains the values.

# 0 to seeds × layers - 1; with %4 at its end, four at a time.
#SBATCH --array=0-11
#SBATCH --job-name=master_thesis
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
##SBATCH --partition=gpu
##SBATCH --account=NAME

set -euo pipefail
seeds=(0 1 2)
layers=(layer2.1 layer3.1 layer4.1 avgpool) # `python main.py --list-layers -m ResNet -d CIFAR10` prints them

task="${SLURM_ARRAY_TASK_ID:?this script is for sbatch, with --array}"
if ((task >= ${#seeds[@]} * ${#layers[@]})); then
    echo "array.sh: task $task has no pair: there are ${#seeds[@]} seeds × ${#layers[@]} layers, counted from 0" >&2
    exit 2
fi
# The program picks its pair: by task, the seed changing fastest. In the container: slurm/container.sh
exec bash slurm/run.sh --seed "${seeds[@]}" --sweep dib-layers "${layers[@]}" "$@"
