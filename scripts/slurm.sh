#!/usr/bin/env bash
# Pretrain under SLURM on any number of nodes. Before its time limit the job saves, is requeued and
# continues. If a rank dies, all ranks restart from the last checkpoint, three times per job.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=32 scripts/slurm.sh \
#       configs/gpt2_770m.toml --run=sophia-g --train.micro_batch_size=10
#
# Pass partition, account and the like to sbatch. A node has one rank per GPU; without
# --gpus-per-node, it has one rank that uses all CPUs of its task, or RANKS_PER_NODE ranks.
#SBATCH --job-name=gpt2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

stop_and_requeue() {
    # This signals the steps, not this script. torchrun passes it on, and train.py saves and exits.
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$steps" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop_and_requeue USR1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port per job, because jobs may share a node; below the ports that systems give out themselves.
port=$((20000 + SLURM_JOB_ID % 12000))
# srun does not take this over from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Without --kill-on-bad-exit, the other nodes would wait for one whose torchrun has died.
srun --kill-on-bad-exit=1 python scripts/torchrun.py \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}}" \
    --rdzv_backend=c10d --rdzv_endpoint="$first_node:$port" --rdzv_id="$SLURM_JOB_ID" \
    --max-restarts=3 --shutdown-timeout=150 -- train.py "$@" --resume &
steps=$!
wait "$steps"
