#!/usr/bin/env bash
# Runs one job on TPU slices of a GKE cluster that xpk created:
#
#     NAME=run CLUSTER=tpus ZONE=us-east5-a TPU_TYPE=v5litepod-16 IMAGE=gcr.io/project/farmer \
#       launch/xpk.sh --config=configs/in256.py --workdir=gs://bucket/run
#
# IMAGE has farmer_jax[tpu,gcs] installed and this repository as its working directory. The workload
# restarts after exit code 75 (preempted, checkpoint saved). Like all workloads of xpk, it also
# restarts after 42 and 127 to 255 (killed, or aborted by JAX because another host was lost).
#
# Environment: PROJECT (default of gcloud). NUM_SLICES (1). RESTARTS (10). DRY_RUN=1 prints the
# command. The manifest that xpk 1.16 writes was inspected. The script has not been tested on a
# cluster.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

for variable in NAME CLUSTER ZONE TPU_TYPE IMAGE; do
  [[ -n ${!variable-} ]] || die "set $variable, as described in launch/xpk.sh"
done
(($#)) || die 'give the arguments of farmer_jax.main: launch/xpk.sh --config=...'

# With exec, the process that receives SIGTERM from xpk is Python and not a shell.
printf -v job ' %q' python -m farmer_jax.main --distributed "$@"
command=(xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--zone=$ZONE"
  ${PROJECT:+"--project=$PROJECT"} "--tpu-type=$TPU_TYPE" "--num-slices=${NUM_SLICES:-1}"
  "--docker-image=$IMAGE" "--max-restarts=${RESTARTS:-10}" --restart-on-exit-codes=75
  --termination-grace-period-seconds=120 "--command=exec$job")

if [[ ${DRY_RUN-} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
