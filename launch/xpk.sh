#!/usr/bin/env bash
# A TPU slice of a GKE cluster that xpk has set up runs one job:
#
#     NAME=run CLUSTER=tpus ZONE=us-east5-a TPU_TYPE=v5litepod-16 IMAGE=gcr.io/project/farmer \
#       launch/xpk.sh --config=configs/in256.py --workdir=gs://bucket/run
#
# IMAGE has farmer_jax[tpu] installed and this repository as its working directory. PROJECT:
# gcloud's own by default; NUM_SLICES (1). RESTARTS: how often the workload starts again (10), after
# exit code 75 (preempted, state saved) and, as xpk always has it, after 42 and 127 to 255: killed,
# or aborted by JAX because another host vanished. DRY_RUN=1 prints the command.
#
# xpk 1.16's manifest for it was made and read; not tried on a cluster.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

for variable in NAME CLUSTER ZONE TPU_TYPE IMAGE; do
  [[ -n ${!variable-} ]] || die "set $variable; launch/xpk.sh says what it is"
done
(($#)) || die 'say what to run: launch/xpk.sh --config=... --workdir=gs://...'

# exec: xpk passes SIGTERM on to the process that it started, which must be Python and not a shell.
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
