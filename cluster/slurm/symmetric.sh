# shellcheck shell=bash
# One Ray over the nodes of a Slurm job, and one command on it. Sourced by the sbatch scripts of this folder.
#
#   on_ray COMMAND…      runs COMMAND on the first node, with Ray on all; returns its exit code
#   finish CODE          puts the job into the queue again where that is due, and ends it
#
# Signals to the batch script:
#   USR1  time is nearly up, or somebody else's job comes first: commit, and into the queue again
#   USR2  commit and end:  scancel --batch --signal=USR2 JOB

stopped=""

on_ray() {
    local nodes head state
    nodes=${SLURM_JOB_NUM_NODES:-1}
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1)
    state=${FTRAY_SLURM_STATE:-$SLURM_SUBMIT_DIR/.ftray-slurm}/$SLURM_JOB_ID
    mkdir -p "$state"
    rm -f "$state/pid"

    # Nobody else on these machines may use this Ray: all its processes ask for a token, which lies in the home folder.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        (umask 077 && mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
    fi
    export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
    export RAY_USAGE_STATS_ENABLED=0

    trap 'stopped=requeue; ask_to_stop "$head" "$state"' USR1
    trap 'stopped=end; ask_to_stop "$head" "$state"' USR2
    # shellcheck disable=SC2016  # the inner shell expands its own process id, which `exec` hands to the command
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        ray symmetric-run --address "$address:6379" --min-nodes "$nodes" \
        --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --temp-dir="/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats \
        -- env RAY_ADDRESS="$address:6379" bash -c 'echo $$ > "$0/pid"; exec "$@"' "$state" "$@" &
    local step=$! code=0
    # A trapped signal ends `wait` early; the step goes on until it has committed.
    while :; do
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2> /dev/null || break
    done
    rm -rf "$state"
    return "$code"
}

# SIGTERM for the command alone, not for Ray's processes beside it.
ask_to_stop() {
    [ -s "$2/pid" ] || return 0
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" kill -TERM "$(cat "$2/pid")" || true
}

finish() {
    # 75: stopped and committed; the same command goes on
    if [ "$1" = 75 ] && [ "$stopped" = requeue ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$1"
}
