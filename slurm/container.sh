#!/usr/bin/env bash
# slurm/run.sh through Apptainer; that file explains the values, and what to do for several GPUs, nodes and seeds.
#     sbatch slurm/container.sh -m ResNet -d CIFAR10
# master_thesis.sif lies where the job is submitted, or: IMAGE=/scratch/me/master_thesis.sif sbatch slurm/container.sh …
# Data elsewhere: APPTAINER_BIND=/scratch sbatch slurm/container.sh … --data-dir /scratch/me/data

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
#SBATCH --output=slurm-%j.out
##SBATCH --partition=gpu
##SBATCH --account=NAME

set -euo pipefail
status=0
export REQUEUED_BY_SCRIPT="$SLURM_JOB_ID" # main.py could not ask for another turn: a container has no scontrol
# Without --cleanenv, which would hide SLURM's variables from Lightning.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    apptainer run --nv "${IMAGE:-master_thesis.sif}" \
    python main.py "$@" --devices "${SLURM_NTASKS_PER_NODE:-1}" --num-nodes "${SLURM_NNODES:-1}" || status=$?

# 138: out of time. Asked from outside of srun, which ends the other processes when the first of them has left.
if [[ $status -eq 138 ]]; then
    job="$SLURM_JOB_ID"
    # By its two numbers: one task of every array has the number of the whole array for its own.
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    scontrol requeue "$job"
fi
exit "$status"
