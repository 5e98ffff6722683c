#!/bin/bash
#SBATCH --job-name=d12 --time=04:00:00 --open-mode=append --signal=B:USR1@120
# A run on one machine that goes on over as many jobs as it needs: two minutes before its time is up Slurm signals this
# script, the run saves its state and ends, and the job is queued again. Flags go to the trainer:
#
#     NPROC=8 sbatch --gres=gpu:8 docs/00-checkpoint-resumption/slurm.sh --model d12 --total_batch_size 524288
name=${SLURM_JOB_NAME:?is set by sbatch}
torchrun --standalone --nproc_per_node="${NPROC:-1}" train_gpt2_mod.py --output_dir "logs/$name" --resume auto "$@" &
launcher=$!
# The trainers are torchrun's children. Signalled themselves, they have all of the two minutes: torchrun gives them 30 s.
trap 'requeue=yes; pkill -USR1 -P $launcher' USR1
wait $launcher
code=$?
while kill -0 $launcher 2>/dev/null; do # the trap ended the wait
    wait $launcher
    code=$?
done
[ -n "${requeue:-}" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
