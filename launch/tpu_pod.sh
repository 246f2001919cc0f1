#!/usr/bin/env bash
# All workers of a TPU pod slice run one job, started over ssh:
#
#     TPU_NAME=pod ZONE=us-central2-b launch/tpu_pod.sh \
#       --config=configs/in256.py --workdir=gs://bucket/run
#
# PROJECT: gcloud's own by default. REPO: the checkout on each worker (~/farmer_jax, in its home);
# PYTHON: the interpreter there (python). RESTARTS: how often exit code 75 (preempted, state saved)
# starts all again (10). DRY_RUN=1 prints the command.
#
# The loop is here and not on the workers: only here is it known that all of them have ended, and a
# worker that was rebooted would have lost its loop. So run this where it may stay, in tmux or on a
# small VM. Ctrl-C ends this script alone; the job ends by
#
#     gcloud compute tpus tpu-vm ssh $TPU_NAME --zone=$ZONE --worker=all \
#       --command="pkill -f '[f]armer_jax.main'"
#
# Several workers need the key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
# A slice that was deleted, as preempted Spot slices are, must be made anew first; the same command
# then goes on. Not tried on a real slice.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

[[ -n ${TPU_NAME-} ]] || die 'set TPU_NAME, the name of the TPU'
[[ -n ${ZONE-} ]] || die 'set ZONE, the zone of the TPU'
(($#)) || die 'say what to run: launch/tpu_pod.sh --config=... --workdir=gs://...'

# The workers' shell expands a leading ~/, and nothing else.
repo=${REPO:-\~/farmer_jax}
case $repo in
  \~/*) printf -v remote 'cd ~/%q' "${repo#\~/}" ;;
  *) printf -v remote 'cd %q' "$repo" ;;
esac
printf -v job ' %q' "${PYTHON:-python}" -m farmer_jax.main --distributed "$@"
command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
  --worker=all "--command=$remote && exec$job")

if [[ ${DRY_RUN-} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

restarts=0
while :; do
  code=0
  # Returns when all workers have ended, with the exit code of the lowest one that failed.
  "${command[@]}" || code=$?
  ((code == 75 && restarts < ${RESTARTS:-10})) || exit "$code"
  restarts=$((restarts + 1))
  echo "tpu_pod.sh: exit code 75; starting again, $restarts of ${RESTARTS:-10}" >&2
done
