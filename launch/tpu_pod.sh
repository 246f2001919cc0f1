#!/usr/bin/env bash
# Runs one job on all workers of a TPU pod slice, over ssh:
#
#     TPU_NAME=pod ZONE=us-central2-b launch/tpu_pod.sh \
#       --config=configs/in256.py --workdir=gs://bucket/run
#
# After exit code 75 (preempted, checkpoint saved) the script restarts the job, at most RESTARTS
# times. It runs outside the slice, because it must wait until all workers have exited, and must
# survive a reboot of a worker. Run the script on a machine that stays up, for example in tmux on a
# small VM. Ctrl-C ends only this script. This command ends the job:
#
#     gcloud compute tpus tpu-vm ssh $TPU_NAME --zone=$ZONE --worker=all \
#       --command="pkill -f '[f]armer_jax.main'"
#
# gcloud needs the key in ssh-agent to reach several workers: ssh-add ~/.ssh/google_compute_engine
# Google deletes a preempted Spot slice. Create the slice again, then run the same command.
#
# Environment: PROJECT (default of gcloud). REPO: the checkout on each worker (~/farmer_jax).
# PYTHON: the interpreter on each worker (python). RESTARTS (10). DRY_RUN=1 prints the command.
# The script has not been tested on a slice.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

[[ -n ${TPU_NAME-} ]] || die 'set TPU_NAME to the name of the TPU'
[[ -n ${ZONE-} ]] || die 'set ZONE to the zone of the TPU'
(($#)) || die 'give the arguments of farmer_jax.main: launch/tpu_pod.sh --config=...'

# The shell of the workers must expand a leading ~/ in REPO and nothing else.
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
  # gcloud waits for all workers and exits with the exit code of the first worker that failed.
  "${command[@]}" || code=$?
  ((code == 75 && restarts < ${RESTARTS:-10})) || exit "$code"
  restarts=$((restarts + 1))
  echo "tpu_pod.sh: exit code 75; restart $restarts of ${RESTARTS:-10}" >&2
done
