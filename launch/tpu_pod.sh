#!/usr/bin/env bash
# One Cloud TPU slice, from the request to the end. launch/README.md walks through it.
# shellcheck disable=SC2016 # what stands in single quotes is for the workers to expand
set -euo pipefail

# Variables: change them here, or set them in the environment.
PROJECT=${PROJECT-}                  # Google Cloud project
ZONE=${ZONE-}                        # gcloud compute tpus accelerator-types list --zone ZONE: what a zone has
ACCELERATOR=${ACCELERATOR-}          # v5litepod-16, v5p-64 (counts cores: 32 chips), v6e-256, ...
RUN_NAME=${RUN_NAME:-jaxlm}          # of the slice and of its request
SPOT=${SPOT:-true}                   # true: cheaper, and can be taken away at any moment
RUNTIME=${RUNTIME-}                  # software of the machines; empty: what belongs to the accelerator
NFS=${NFS-}                          # HOST:/EXPORT of storage that all workers share; empty: nothing is mounted
SHARED=${SHARED:-/mnt/shared}        # where it is mounted
WORKER=${WORKER:-0}                  # whose log `logs` follows: a number, or all

usage() {
    cat <<'END'
usage: launch/tpu_pod.sh [--dry-run] COMMAND [-- WORDS OF jaxlm.train]
  create            ask for the slice, and wait until it is there
  install           this working tree and its packages on all workers; mounts NFS
  start -- WORDS    python -m jaxlm.train WORDS on all workers, in the background
  logs              follow the output of worker $WORKER
  status            of the slice, and of the run on each worker
  stop              SIGTERM: all workers save the same step and end
  restart -- WORDS  stop and start; a slice that was taken away is asked for anew and installed first
  delete            give the slice back: until then it costs, whether it works or not
--dry-run prints the commands and runs none. Variables stand at the top of the script.
END
}

die() { echo "error: $*" >&2; exit 2; }

need() {
    local name
    for name in "$@"; do
        [[ -n ${!name} ]] || die "$name is not set; set it at the top of launch/tpu_pod.sh or in the environment"
    done
}

run() {
    if [[ $dry == false ]]; then
        "$@"
        return
    fi
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="$word "
    done
    echo "${line% }"
}

queue() { run gcloud compute tpus queued-resources "$@" --project "$PROJECT" --zone "$ZONE"; }

on_workers() { # WORKERS COMMAND
    run gcloud compute tpus tpu-vm ssh "$RUN_NAME" --project "$PROJECT" --zone "$ZONE" --worker="$1" --command "$2"
}

state() { gcloud compute tpus queued-resources describe "$RUN_NAME" --project "$PROJECT" --zone "$ZONE" \
    --format 'value(state.state)'; }

runtime() {
    case $ACCELERATOR in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v[234]-*) echo tpu-ubuntu2204-base ;;
        *) die "ACCELERATOR: no runtime known for $ACCELERATOR; set RUNTIME (gcloud compute tpus versions list)" ;;
    esac
}

create() {
    need ACCELERATOR
    local found='' options=(--node-id "$RUN_NAME" --accelerator-type "$ACCELERATOR")
    options+=(--runtime-version "${RUNTIME:-$(runtime)}")
    [[ $SPOT != true ]] || options+=(--spot)
    if [[ $dry == false ]]; then
        found=$(state 2>/dev/null) || found='' # no such request: create says what else may be wrong
    fi
    if [[ -n $found ]]; then
        echo "$RUN_NAME was asked for before; waiting for it"
    else
        queue create "$RUN_NAME" "${options[@]}"
    fi
    if [[ $dry == true ]]; then
        queue describe "$RUN_NAME" --format 'value(state.state)'
        return
    fi
    local now='' before=''
    while now=$(state) || die "$RUN_NAME: gcloud could not say how it is; try create again"; [[ $now != ACTIVE ]]; do
        [[ $now == "$before" ]] || echo "$(date +%T) $RUN_NAME: $now"
        before=$now
        case $now in
            FAILED | SUSPENDED | SUSPENDING)
                die "$RUN_NAME is $now; see 'gcloud compute tpus queued-resources describe $RUN_NAME' (quota? stock" \
                    "of this zone?), then delete it and create it anew" ;;
        esac
        sleep "${POLL_SECONDS:-20}"
    done
    echo "$(date +%T) $RUN_NAME: ACTIVE"
}

install() {
    local root archive
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=${TMPDIR:-/tmp}/jaxlm-$RUN_NAME.tar.gz
    run tar -czf "$archive" -C "$root" --exclude=__pycache__ \
        pyproject.toml README.md LICENSE jaxlm convert configs launch
    run gcloud compute tpus tpu-vm scp "$archive" "$RUN_NAME:jaxlm.tar.gz" --project "$PROJECT" --zone "$ZONE" \
        --worker=all
    # The machines' own Python is older than what jaxlm needs: uv brings one.
    local remote='set -e
        rm -rf "$HOME/jaxlm" && mkdir "$HOME/jaxlm" && tar -xzf "$HOME/jaxlm.tar.gz" -C "$HOME/jaxlm"
        python3 -m pip install --quiet --user --upgrade uv
        python3 -m uv venv --quiet --allow-existing --python 3.12 "$HOME/jaxlm-env"
        python3 -m uv pip install --quiet --upgrade --python "$HOME/jaxlm-env/bin/python" "$HOME/jaxlm[tpu]"'
    if [[ -n $NFS ]]; then
        remote+="
        command -v mount.nfs > /dev/null || sudo apt-get install -y -qq nfs-common
        sudo mkdir -p ${SHARED@Q}
        mountpoint -q ${SHARED@Q} || sudo mount -t nfs ${NFS@Q} ${SHARED@Q}
        [ -w ${SHARED@Q} ] || sudo chmod 1777 ${SHARED@Q}"
    fi
    on_workers all "$remote"
}

start() {
    local remote
    [[ ${#words[@]} -gt 0 ]] || die "no words for jaxlm.train; e.g. start -- --config FILE --output_dir $SHARED/out/run"
    # systemd keeps it running when this connection ends, starts it again when it fails (not after a mistake in the
    # input, status 2), and sends SIGTERM when the machine goes down. It knows no limits of a login: TPUs pin memory.
    remote='sudo systemd-run --unit=jaxlm --collect --uid="$(id -un)" --working-directory="$HOME/jaxlm"'
    remote+=' -p KillMode=mixed -p TimeoutStopSec=600 -p LimitMEMLOCK=infinity -p LimitNOFILE=1048576'
    remote+=' -p Restart=on-failure -p RestartSec=15 -p RestartPreventExitStatus=2'
    remote+=' -p StartLimitIntervalSec=3600 -p StartLimitBurst=10'
    remote+=' -p StandardOutput=append:"$HOME/jaxlm.log" -p StandardError=append:"$HOME/jaxlm.log"'
    remote+=' "$HOME/jaxlm-env/bin/python" -m jaxlm.train'
    remote+=$(printf ' %q' "${words[@]}")
    on_workers all "$remote"
}

stop() { on_workers all 'if systemctl cat jaxlm > /dev/null 2>&1; then sudo systemctl stop jaxlm; fi'; }

restart() {
    local now
    if [[ $dry == true ]]; then
        echo "# while $RUN_NAME is there:"
        stop
        echo "# when it was taken away:"
        now=SUSPENDED
    else
        now=$(state) # its failure ends the script: nothing is deleted that is only out of reach
    fi
    case $now in
        ACTIVE) stop ;;
        FAILED | SUSPENDED | SUSPENDING) queue delete "$RUN_NAME" --force --quiet; create; install ;;
        *) create; install ;; # still in the queue
    esac
    if [[ $dry == true ]]; then
        echo "# then:"
    fi
    start
}

dry=false
words=()
command=''
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=true ;;
        -h | --help) usage; exit ;;
        --) shift; words=("$@"); break ;;
        -*) die "$1 is not an option here; words of jaxlm.train come after --" ;;
        *) [[ -z $command ]] || die "$1: one command at a time; words of jaxlm.train come after --"; command=$1 ;;
    esac
    shift
done
[[ -n $command ]] || { usage >&2; exit 2; }
[[ $SPOT == true || $SPOT == false ]] || die "SPOT: $SPOT must be true or false"
need PROJECT ZONE
case $command in
    create | install | start | stop | restart) "$command" ;;
    logs) on_workers "$WORKER" 'tail -n 200 -F jaxlm.log' ;;
    status)
        queue describe "$RUN_NAME" --format 'value(state.state)'
        on_workers all 'echo "$(hostname): $(systemctl is-active jaxlm)"' ;;
    delete) queue delete "$RUN_NAME" --force ;;
    *) die "$command: no such command; one of create install start logs status stop restart delete" ;;
esac
