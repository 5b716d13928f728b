#!/usr/bin/env bash
# A JobSet on GKE, TPU or GPU, from start to end: fills in launch/gke_tpu.yaml or launch/gke_gpu.yaml, and hands it to
# kubectl. launch/README.md walks through it.
set -euo pipefail

# Variables: change them here, or set them in the environment.
RUN_NAME=${RUN_NAME:-jaxlm}                # of the JobSet
NAMESPACE=${NAMESPACE:-default}
IMAGE=${IMAGE-}                            # made from launch/Dockerfile, where the cluster can pull it
CLAIM=${CLAIM-}                            # a ReadWriteMany PersistentVolumeClaim: /shared in every pod
MAX_RESTARTS=${MAX_RESTARTS:-10}           # after failures; pre-emptions do not count
ACCELERATOR=${ACCELERATOR-}                # tpu: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
                                           # gpu: nvidia-h100-80gb, nvidia-h100-mega-80gb, nvidia-h200-141gb, ...
TOPOLOGY=${TOPOLOGY-}                      # tpu: of a slice, e.g. 4x4, 16x16, 2x2x4
CHIPS=${CHIPS:-4}                          # tpu: chips of a host (8 on a one-host v5e or v6e slice 2x4)
SLICES=${SLICES:-1}                        # tpu: slices; mesh.data wants to be a multiple of it
NODES=${NODES:-2}                          # gpu: nodes, one process each
GPUS=${GPUS:-8}                            # gpu: GPUs of a node

usage() {
    cat <<'END'
usage: launch/gke.sh [--dry-run] tpu|gpu COMMAND [-- WORDS OF jaxlm.train]
  start -- WORDS    python -m jaxlm.train WORDS in every pod
  logs              follow the output of process 0
  status            of the JobSet and its pods
  restart -- WORDS  delete and start (after pre-emptions and failures the JobSet restarts by itself)
  delete            end it: its pods get SIGTERM, save, and go; the node pool stays, and costs
--dry-run prints the manifest and the commands, and runs none. Variables stand at the top of the script.
END
}

die() { echo "error: $*" >&2; exit 2; }

run() {
    if [[ $dry == true ]]; then
        echo "$*"
    else
        "$@"
    fi
}

hosts() { # of a slice: its chips by those of a host
    local chips=1 side sides
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || die "TOPOLOGY: '$TOPOLOGY' must be like 4x4 or 2x2x4"
    [[ $CHIPS =~ ^[1-9][0-9]*$ ]] || die "CHIPS: '$CHIPS' must be a number"
    IFS=x read -ra sides <<< "$TOPOLOGY"
    for side in "${sides[@]}"; do
        chips=$((chips * side))
    done
    [[ $chips -gt 0 && $((chips % CHIPS)) -eq 0 ]] ||
        die "TOPOLOGY: $TOPOLOGY has $chips chips, which CHIPS=$CHIPS per host does not divide"
    echo $((chips / CHIPS))
}

manifest() {
    local text name
    [[ ${#words[@]} -gt 0 ]] || die "no words for jaxlm.train; e.g. start -- --config FILE --output_dir /shared/out/run"
    [[ $RUN_NAME =~ ^[a-z]([a-z0-9-]{0,37}[a-z0-9])?$ ]] ||
        die "RUN_NAME: '$RUN_NAME' must be a name of Kubernetes (a-z, 0-9, -), 39 characters at most"
    WORDS=$(printf '%q ' "${words[@]}")
    WORDS=${WORDS% }
    # shellcheck disable=SC2034 # the manifest asks for it by name
    [[ $kind == gpu ]] || HOSTS=$(hosts)
    # Comments go first: they may name variables, and need none.
    text=$(sed -E '/^ *#/d' "$(dirname "${BASH_SOURCE[0]}")/gke_$kind.yaml")
    # In one pass, so that what a value holds is not taken for a variable.
    while [[ $text =~ \$\{([A-Z_]+)\} ]]; do
        name=${BASH_REMATCH[1]}
        [[ -n ${!name-} ]] || die "$name is not set; set it at the top of launch/gke.sh or in the environment"
        printf '%s%s' "${text%%"${BASH_REMATCH[0]}"*}" "${!name}"
        text=${text#*"${BASH_REMATCH[0]}"}
    done
    printf '%s\n' "$text"
}

start() {
    local text
    text=$(manifest)
    if [[ $dry == true ]]; then
        echo "$text"
        echo "# the above goes to:"
    fi
    # Not apply: of a JobSet that is there already it would say 'unchanged', and start nothing.
    run kubectl create -f - <<< "$text"
}

dry=false
words=()
kind=''
command=''
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=true ;;
        -h | --help) usage; exit ;;
        --) shift; words=("$@"); break ;;
        -*) die "$1 is not an option here; words of jaxlm.train come after --" ;;
        *)
            if [[ -z $kind ]]; then kind=$1
            elif [[ -z $command ]]; then command=$1
            else die "$1: one command at a time; words of jaxlm.train come after --"
            fi ;;
    esac
    shift
done
[[ -n $kind && -n $command ]] || { usage >&2; exit 2; }
[[ $kind == tpu || $kind == gpu ]] || die "$kind: must be tpu or gpu"
here=(-n "$NAMESPACE")
pods="jobset.sigs.k8s.io/jobset-name=$RUN_NAME"
case $command in
    start) start ;;
    logs)
        run kubectl logs -f --tail 200 "${here[@]}" \
            -l "$pods,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
    status)
        run kubectl get jobset "$RUN_NAME" "${here[@]}"
        run kubectl get pods "${here[@]}" -l "$pods" -o wide ;;
    restart)
        text=$(manifest) # a mistake is to be found before anything ends
        run kubectl delete jobset "$RUN_NAME" "${here[@]}" --ignore-not-found --wait --cascade=foreground
        start ;;
    delete) run kubectl delete jobset "$RUN_NAME" "${here[@]}" ;;
    *) die "$command: no such command; one of start logs status restart delete" ;;
esac
