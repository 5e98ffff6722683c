#!/bin/bash
#SBATCH --job-name=d12 --time=04:00:00 --open-mode=append --ntasks-per-node=1 --signal=B:USR1@120
# A run that goes on over as many jobs as it needs: two minutes before its time is up Slurm signals this script, the run
# saves its state and ends, and the job is queued again. Flags go to the trainer; NPROC says how many GPUs a machine has:
#
#     NPROC=8 sbatch --gres=gpu:8 docs/00-checkpoint-resumption/slurm.sh --model d12 --total_batch_size 524288
#     NPROC=8 sbatch --nodes=2 --gres=gpu:8 docs/00-checkpoint-resumption/slurm.sh --model d12 --total_batch_size 524288
name=${SLURM_JOB_NAME:?is set by sbatch}
launch=(torchrun --nproc_per_node="${NPROC:-1}")
if [ "${SLURM_NNODES:-1}" = 1 ]; then
    launch+=(--standalone)
else # each machine runs this script as a PART, and the torchruns meet on the first one
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    launch+=(--nnodes="$SLURM_NNODES" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID"
        --rdzv_endpoint="$first:$((29500 + SLURM_JOB_ID % 1000))")
fi
# No --max_restarts: torchrun would start again what a signal has ended.
#
# The trainers are torchrun's children. Signalled themselves, they have all of the two minutes: torchrun gives them 30 s.
# Slurm signals a PART with all of its process group, in which torchrun would end of it.
if [ "${SLURM_NNODES:-1}" = 1 ] || [ -n "${PART:-}" ]; then
    (trap '' USR1 && exec "${launch[@]}" train_gpt2_mod.py --output_dir "logs/$name" --resume auto "$@") &
    tell() { pkill -USR1 -P $launcher; }
else
    PART=yes srun bash docs/00-checkpoint-resumption/slurm.sh "$@" &
    tell() { kill -USR1 $launcher; } # srun passes it on to every machine
fi
launcher=$!
trap 'requeue=yes; tell' USR1
wait $launcher
code=$?
while kill -0 $launcher 2>/dev/null; do # the trap ended the wait
    wait $launcher
    code=$?
done
[ -n "${requeue:-}" ] && [ -z "${PART:-}" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
