#!/bin/bash
# Trains the decoder on two nodes of a Slurm cluster, with one process on each:
#
#     sbatch examples/decoder/slurm.sh --mesh data=4,model=4 --width 512 --heads 8
#
# Each process finds the others through Slurm. A job that is started again continues from
# the last checkpoint, so requeue it as often as needed. The output folder must be on a
# disk that all nodes share.
#SBATCH --job-name=decoder
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
srun "${PYTHON:-python}" examples/decoder/train.py --cluster --resume --out "${OUT:-decoder-run}" "$@"
