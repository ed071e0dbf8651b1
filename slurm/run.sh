#!/usr/bin/env bash
# One run, from the checkout, with the environment active: it goes along with the job.
#     conda activate master_thesis        # or: source .venv/bin/activate
#     sbatch slurm/run.sh -m ResNet -d CIFAR10
# A value below is changed here, or for one job before the script's name:
#     sbatch --time=12:00:00 --account=mine slurm/run.sh -m ResNet -d CIFAR10
# Several GPUs are one process each, under DDP; several nodes alike. --devices and --num-nodes are set from it:
#     sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/run.sh -m ResNet -d CIFAR10
# Several seeds, one in each task:
#     sbatch --array=0-3 slurm/run.sh -m ResNet -d CIFAR10 --seed 0 1 2 3

# Not `bash` or `interactive`: under these names Lightning and main.py take it for no batch job.
#SBATCH --job-name=master_thesis
#SBATCH --nodes=1
# As many tasks as GPUs, on every node. Not --ntasks, which Lightning refuses.
#SBATCH --ntasks-per-node=1
# Some clusters want --gres=gpu:1. Not --gpus-per-task: a process must see all GPUs of its node.
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
# Short of time the run ends in its last whole epoch, is queued again and goes on in its folder.
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
# Where the job is submitted, since a folder that does not exist would end it without a word.
#SBATCH --output=slurm-%j.out
# What your cluster asks for:
##SBATCH --partition=gpu
##SBATCH --account=NAME

set -euo pipefail
status=0
export REQUEUED_BY_SCRIPT="$SLURM_JOB_ID" # main.py asks for another turn itself where no script says that it does
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python main.py "$@" --devices "${SLURM_NTASKS_PER_NODE:-1}" --num-nodes "${SLURM_NNODES:-1}" || status=$?

# 138: out of time. Asked from outside of srun, which ends the other processes when the first of them has left.
if [[ $status -eq 138 ]]; then
    job="$SLURM_JOB_ID"
    # By its two numbers: one task of every array has the number of the whole array for its own.
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    scontrol requeue "$job"
fi
exit "$status"
