#!/usr/bin/env bash
# A run on GPUs under Slurm: launch/slurm.sh [--dry-run] -- WORDS OF jaxlm.train. It hands itself to sbatch; inside the
# job it starts one process per GPU. Before the time limit, and when pre-empted, the run saves and is queued again.
set -euo pipefail

# Variables: change them here, or set them in the environment.
RUN_NAME=${RUN_NAME:-jaxlm}
NODES=${NODES:-1}
GPUS=${GPUS:-8}                  # per node, one process each
CPUS=${CPUS:-8}                  # per process
TIME=${TIME:-24:00:00}           # limit of one stay in the cluster; the run has as many as it needs
WARN=${WARN:-600}                # seconds before that limit at which all save and end: a step and a save take less
RESTARTS=${RESTARTS:-100}        # how often the run is queued again
OPTIONS=${OPTIONS-}              # more for sbatch, e.g. "--partition=gpu --account=geo --constraint=h100"
PYTHON=${PYTHON:-.venv/bin/python}   # where jaxlm is installed; the same path on every node
LOGS=${LOGS:-out/slurm}          # what the job prints: LOGS/RUN_NAME-JOB.log

usage() {
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    echo "--dry-run prints the commands, and runs none. Variables stand at the top of the script."
}

die() { echo "error: $*" >&2; exit 2; }

run() {
    if [[ $dry == true ]]; then
        printf '%q ' "$@" | sed 's/ $//'
        echo
    else
        "$@"
    fi
}

train() {
    # Not --kill-on-bad-exit: all end together anyway, and their own exit status counts. --wait is for one that hangs.
    run srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$CPUS" \
        "$PYTHON" -m jaxlm.train "$@" --distributed.interrupted_status 75
}

submit() {
    local number options more
    for number in NODES GPUS CPUS WARN; do
        [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "$number: '${!number}' must be a whole number, at least 1"
    done
    [[ $# -gt 0 ]] || die "no words for jaxlm.train; e.g. launch/slurm.sh -- --config FILE --output_dir out/run"
    [[ $dry == true || -x $(command -v "$PYTHON") ]] ||
        die "PYTHON: $PYTHON is not there; install jaxlm (README.md), or set PYTHON to the Python that has it"
    options=(--job-name="$RUN_NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS")
    # TERM goes to the processes, not to this script (that would be B:TERM).
    options+=(--cpus-per-task="$CPUS" --time="$TIME" --signal="TERM@$WARN" --requeue --open-mode=append)
    options+=(--output="$LOGS/%x-%j.log")
    read -ra more <<< "$OPTIONS"
    run mkdir -p "$LOGS" # sbatch does not, and the job would fail without a word
    run sbatch "${options[@]}" ${more[@]+"${more[@]}"} "${BASH_SOURCE[0]}" --in-job -- "$@"
    if [[ $dry == true ]]; then
        echo "# and in the job:"
        train "$@"
    fi
}

job() {
    local status=0 state
    # Signals for the job reach this shell too: it is to outlive the run, and read how that ended.
    trap : TERM
    echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
    train "$@" || status=$?
    # 75: saved and ended by a signal; 143: SIGTERM came before the first step.
    if [[ $status -eq 75 || $status -eq 143 ]]; then
        # Not RUNNING: cancelled, or being pre-empted, which queues it again by itself.
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
        if [[ $state == RUNNING && ${SLURM_RESTART_COUNT:-0} -lt $RESTARTS ]]; then
            echo "$(date '+%F %T') queued again"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "$(date '+%F %T') the job is $state after $((${SLURM_RESTART_COUNT:-0} + 1)) starts; not queued again"
        fi
    fi
    exit "$status"
}

dry=false
in_job=false
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=true ;;
        --in-job) in_job=true ;;
        -h | --help) usage; exit ;;
        --) shift; break ;;
        *) die "$1 is not an option here; words of jaxlm.train come after --" ;;
    esac
    shift
done
if [[ $in_job == true ]]; then
    job "$@"
else
    submit "$@"
fi
