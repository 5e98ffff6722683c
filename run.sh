#!/usr/bin/env bash
# Presets: one command line each. What follows the name is added to it, and the last value of a flag counts:
#
#     ./run.sh                          quickstart: environment, text that comes with Python, a small model, a sample
#     ./run.sh test                     the tests;  ./run.sh test-all  with the slow ones
#     ./run.sh d12 | d12_mlp3x | ...    a preset of train_gpt2_mod.py on FineWeb (python data/fineweb.py fetches it)
#     ./run.sh d12_fast                 a recipe meant to reach a loss soon: its steps, rates and schedule are the preset's
#     ./run.sh speedrun                 the same from nothing: fetches 200 M tokens, takes the micro-batch that fits the GPU
#     ./run.sh nocap                    the reference run: d12 to a validation loss of 3.3821 on FineWeb
#     ./run.sh gqa                      the same with a quarter of the key/value heads and 12% more width
#     ./run.sh help                     this text
#
# NPROC=8 ./run.sh d12 trains on 8 GPUs. Micro-batches are small, for small cards; with 80 GB add --batch_size 64.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
name=${1:-quickstart}
[ $# -gt 0 ] && shift
[ "$name" = help ] && sed -n '2,/^set /s/^# \{0,1\}//p' run.sh | sed '/^set /d' && exit

source activate_env.sh
launch=(python train_gpt2_mod.py) # one process needs no torchrun, whose report would bury an error's one line
[ "${NPROC:-1}" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$NPROC" train_gpt2_mod.py)

case "$name" in
quickstart)
    python data/quickstart.py
    python train_gpt2_mod.py --model tiny --input_bin 'data/quickstart/train_*.bin' --input_val_bin 'data/quickstart/val_*.bin' \
        --batch_size 16 --sequence_length 128 --num_iterations 600 --learning_rate 3e-3 --warmup_iters 30 --warmdown_iters 200 \
        --val_loss_every 200 --val_tokens 32768 --log_every 50 --output_dir logs "$@"
    python tools/sample.py logs --prompt 'The ' --max_new_tokens 300
    ;;
test | test-all)
    stamp="$(cat requirements*.txt | cksum)"
    if [ "$(cat .venv/.stamp-dev 2>/dev/null)" != "$stamp" ]; then
        pip install --quiet -r requirements-dev.txt
        echo "$stamp" >.venv/.stamp-dev
    fi
    [ "$name" = test ] && set -- -m 'not slow' "$@"
    python -m pytest tests -n auto --maxprocesses 8 "$@"
    ;;
nocap)
    "${launch[@]}" --model d12 --batch_size 16 --sequence_length 1024 --total_batch_size 524288 --num_iterations 4768 \
        --learning_rate 1.8e-3 --warmup_iters 256 --warmdown_iters 1024 --weight_decay 0.1 --grad_clip 0 \
        --val_loss_every 128 --target_val_loss 3.3821 --save_every 512 --output_dir logs "$@"
    ;;
gqa)
    "${launch[@]}" --model d12 --gqa_enabled --kv_head_ratio 0.25 --embd_scale 1.12 \
        --batch_size 16 --sequence_length 1024 --total_batch_size 524288 --num_iterations 4768 \
        --learning_rate 1.8e-3 --warmup_iters 256 --warmdown_iters 1024 --weight_decay 0.1 --grad_clip 0 \
        --val_loss_every 128 --target_val_loss 3.3821 --save_every 512 --output_dir logs "$@"
    ;;
speedrun)
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "error: speedrun needs an NVIDIA GPU; ./run.sh trains a small model on what is here" >&2
        exit 2
    }
    [[ " $* " == *" --input_bin "* ]] || python data/fineweb.py 2
    "${launch[@]}" --model d12_fast --batch_size auto --sequence_length 1024 --val_loss_every 100 --save_every 250 \
        --output_dir logs "$@"
    ;;
*_fast)
    "${launch[@]}" --model "$name" --batch_size 16 --sequence_length 1024 --val_loss_every 100 --save_every 250 \
        --output_dir logs "$@"
    ;;
d* | gpt2* | sized*)
    "${launch[@]}" --model "$name" --batch_size 8 --sequence_length 1024 --num_iterations 5000 \
        --learning_rate 1e-4 --warmup_iters 100 --val_loss_every 250 --save_every 500 --output_dir logs "$@"
    ;;
*)
    echo "error: ./run.sh knows no '$name'; ./run.sh help lists what it knows" >&2
    exit 2
    ;;
esac
