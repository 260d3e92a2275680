#!/usr/bin/env bash
#SBATCH --job-name=kdrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One task per GPU; Lightning reads ranks and addresses from SLURM. Five minutes before the time limit, or on
# preemption, the run saves a checkpoint and ends with 143; SLURM queues it again, and it resumes from there.
#   sbatch configs/hardware/slurm.sh my.yaml [flags]
set -u
srun python -m kdrl_lightning fit --config "$1" --config configs/hardware/node8.yaml \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --ckpt_path last "${@:2}"
code=$?
if [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
