#!/usr/bin/env bash
# Runs one job in N processes on this machine:
#
#     launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# The lines of process i start with [i]. When a process fails, the script stops the other processes
# and exits with the exit code of the failed process. After exit code 75 (preempted, checkpoint
# saved) the script restarts all processes, at most RESTARTS times. The script forwards SIGTERM and
# SIGINT to the processes, and then exits without a restart.
#
# Environment: RESTARTS (10). PORT of the coordinator (a free port). GRACE: seconds between SIGTERM
# and SIGKILL (60). DRY_RUN=1 prints the commands. Needs bash 5.1.
set -euo pipefail
# With job control, each process has its own process group. Ctrl-C then reaches a process only
# through the trap below, and bash does not make background processes ignore SIGINT.
set -m

die() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash 5.1 is needed, not $BASH_VERSION"
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || die 'give the number of processes: launch/local.sh N --config=...'
(($# > 1)) || die 'give the arguments of farmer_jax.main: launch/local.sh N --config=...'
count=$1
arguments=("${@:2}")

# Sets `port` to PORT or to an unused port below the range of ephemeral ports of Linux.
choose_port() {
  port=${PORT-}
  while [[ -z $port ]]; do
    port=$((20000 + RANDOM % 12000))
    if (: <>"/dev/tcp/localhost/$port") 2>/dev/null; then port=; fi
  done
}

# Sets `command` to the command of process $1.
set_command() {
  command=(python -m farmer_jax.main "--coordinator=localhost:$port" "--num_processes=$count"
    "--process_id=$1" "${arguments[@]}")
  # Process i gets GPU i, as under SLURM. By default, each process would take all GPUs.
  ((count == 1)) || command=(env "JAX_LOCAL_DEVICE_IDS=$1" "${command[@]}")
}

# Sends signal $1 to all processes, or to their process groups if $2 is a minus sign.
send() {
  local pid
  for pid in "${!processes[@]}"; do
    kill "-$1" -- "${2-}$pid" 2>/dev/null || true
  done
}

# Runs all processes. Sets `code` to the exit code of the first process that failed, or to 0.
run_all() {
  local i output status ended number timer='' printers=()
  choose_port
  code=0
  for ((i = 0; i < count && !stopping; i++)); do
    set_command "$i"
    # sed ignores signals, so that it prints the last lines of the process after Ctrl-C.
    exec {output}> >(trap '' HUP INT TERM && exec sed -u "s/^/[$i] /")
    printers+=($!)
    "${command[@]}" >&"$output" 2>&1 </dev/null &
    processes[$!]=$i
    exec {output}>&-
  done
  while ((${#processes[@]})); do
    status=0
    # Without 2>/dev/null, bash prints a line for a process that a signal ended.
    wait -n -p ended "${!processes[@]}" $timer 2>/dev/null || status=$?
    if [[ -z ${ended-} ]]; then # A trap interrupted the wait.
      continue
    elif [[ $ended == "$timer" ]]; then
      timer=
      send KILL -
      continue
    fi
    number=${processes[$ended]}
    unset "processes[$ended]"
    # Child processes, such as data workers, would keep devices and the output open.
    kill -KILL -- "-$ended" 2>/dev/null || true
    if ((status && !code)); then
      code=$status
      echo "local.sh: process $number ended with exit code $code" >&2
      # After exit code 75, the other processes exit without a signal.
      ((code == 75)) || send TERM
      sleep "${GRACE:-60}" &
      timer=$!
    fi
  done
  [[ -z $timer ]] || kill "$timer" 2>/dev/null || true
  wait $timer "${printers[@]}" 2>/dev/null || true
}

if [[ ${DRY_RUN-} == 1 ]]; then
  choose_port
  for ((i = 0; i < count; i++)); do
    set_command "$i"
    printf '%q ' "${command[@]}"
    echo
  done
  exit
fi

processes=() # PID -> index of the process in the job
stopping=0
trap 'stopping=1; send TERM' HUP TERM
trap 'stopping=1; send INT' INT
restarts=0
while :; do
  run_all
  ((code == 75 && !stopping && restarts < ${RESTARTS:-10})) || exit "$code"
  restarts=$((restarts + 1))
  echo "local.sh: restart $restarts of ${RESTARTS:-10}" >&2
done
