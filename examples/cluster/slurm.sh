#!/usr/bin/env bash
# Train on several machines of a Slurm cluster. From the repository's folder, which all machines see at this path:
#
#   sbatch examples/cluster/slurm.sh --config my.yaml [--set SECTION.KEY=VALUE ...]
#   sbatch --nodes=16 --time=48:00:00 examples/cluster/slurm.sh --config my.yaml      (sbatch's options come first)
#
# Five minutes before the time is up, or when the job is preempted, the run finishes its step, saves and leaves; the job
# then goes back into the queue and continues from there.
#
#SBATCH --job-name=megatron_cca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# What a cluster may want besides: --partition, --account, --qos.

set -euo pipefail

# --- what to set: here, or in the environment of sbatch -----------------------------------------------------------------
PROJECT="${PROJECT:-${SLURM_SUBMIT_DIR:-$PWD}}"            # the repository, at the same path on all machines
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-gpu}}" # ranks on each machine; gpu: as many as it has GPUs
MAX_RESTARTS="${MAX_RESTARTS:-0}"                           # attempts within this job after a rank has died
RDZV_PORT="${RDZV_PORT:-}"                                  # on the first machine; default: from the job's number
PYTHON="${PYTHON:-}"                                        # default: the repository's .venv, python3 in a container
CONTAINER_IMAGE="${CONTAINER_IMAGE:-}"                      # with pyxis and enroot: an image or .sqsh file
CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-}"                    # FROM:TO,... besides the repository: data, checkpoints

# NCCL finds the network by itself on most clusters. Where it does not, NCCL_DEBUG=INFO says what it took.
# export NCCL_DEBUG=INFO
# export NCCL_SOCKET_IFNAME=eth0        # the interface for its bootstrap; GLOO_SOCKET_IFNAME likewise for gloo
# export NCCL_IB_HCA=mlx5               # InfiniBand adapters, where some are for storage only
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# ------------------------------------------------------------------------------------------------------------------------

refuse() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: sbatch examples/cluster/slurm.sh --config my.yaml"
[ -f "$PROJECT/examples/pretrain_cca_emu3.sh" ] ||
    refuse "PROJECT: $PROJECT is not the repository; call sbatch in its folder, or set PROJECT"
[ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] ||
    refuse "--ntasks-per-node=$SLURM_NTASKS_PER_NODE: one agent a machine starts all its ranks; leave it at 1"
cd "$PROJECT"
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -n "$CONTAINER_IMAGE" ] || [ ! -x .venv/bin/python ] || PYTHON="$PROJECT/.venv/bin/python"
fi

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${hosts%%$'\n'*}"
# Two jobs on one machine must not meet; below the ports that the system hands out.
port="${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

container=()
if [ -n "$CONTAINER_IMAGE" ]; then
    mounts="$PROJECT:$PROJECT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PROJECT")
fi

# Two minutes after the first agent has ended srun ends the others, and it binds none to a part of its machine. The first
# machine (SLURM_NODEID 0) holds the store at which all meet.
# shellcheck disable=SC2016 # expanded on each machine
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=120 --cpu-bind=none \
    --label --unbuffered "${container[@]}" \
    bash -c 'exec "$1" "$2" --rdzv-conf="is_host=$((SLURM_NODEID == 0))" "${@:3}"' agent \
    "$PYTHON" examples/cluster/agent.py --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$GPUS_PER_NODE" \
    --max-restarts="$MAX_RESTARTS" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port" \
    examples/pretrain_cca_emu3.sh "$@" &
step=$!

# srun passes SIGUSR1 on to its tasks (SIGTERM it would not); once, since a second would cut the agents' waiting short.
asked="" cancelled=""
trap '[ -n "$asked" ] || kill -USR1 "$step"; asked=yes' USR1
trap 'cancelled=yes' TERM
# Not by wait alone, which can sleep through a signal that comes as it begins. scancel ends the sleep, too.
while kill -0 "$step" 2>/dev/null; do sleep 1 || true; done
status=0
wait "$step" || status=$?

# 138 and 143: every rank was asked to go, and the run has saved. scancel asks too, but tells this script so.
[ "$status" != 138 ] && [ "$status" != 143 ] || asked=yes
if [ "$status" = 0 ]; then
    exit 0
elif [ "$status" = 2 ]; then
    echo "slurm.sh: refused; the line above says why" >&2
elif [ -n "$asked" ] && [ -z "$cancelled" ]; then
    echo "slurm.sh: exit status $status; job $SLURM_JOB_ID goes back into the queue and continues from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "slurm.sh: exit status $status, for what is above; the same command continues from the newest checkpoint" >&2
fi
exit "$status"
