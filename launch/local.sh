#!/usr/bin/env bash
# N processes on this machine run one job together:
#
#     launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# Lines of process i start with [i]. The first process that fails ends the others, and the script
# with its exit code. After exit code 75 (preempted, state saved) all start again, at most RESTARTS
# times (10). SIGTERM and SIGINT are passed on; then nothing starts again, and the caller gets 75.
# PORT: the coordinator's (a free one). GRACE: seconds that the others have to leave, before SIGKILL
# (60). DRY_RUN=1 prints the commands. Bash 5.1 or newer.
set -euo pipefail
# Processes get groups of their own: Ctrl-C reaches them once, through the trap below, and bash does
# not make them ignore it.
set -m

die() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash 5.1 is needed, not $BASH_VERSION"
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || die 'say how many processes: launch/local.sh N --config=... ...'
(($# > 1)) || die 'say what to run: launch/local.sh N --config=... ...'
count=$1
arguments=("${@:2}")

# Sets `port` to one that nothing listens on, below those that Linux hands out by itself.
choose_port() {
  port=${PORT-}
  while [[ -z $port ]]; do
    port=$((20000 + RANDOM % 12000))
    if (: <>"/dev/tcp/localhost/$port") 2>/dev/null; then port=; fi
  done
}

# Sets `command` to that of process $1.
set_command() {
  command=(python -m farmer_jax.main "--coordinator=localhost:$port" "--num_processes=$count"
    "--process_id=$1" "${arguments[@]}")
  # A GPU each, the one of its number, as under SLURM: by itself every process would take all.
  ((count == 1)) || command=(env "JAX_LOCAL_DEVICE_IDS=$1" "${command[@]}")
}

# Sends signal $1 to all processes; to their groups where $2 is a minus sign.
send() {
  local pid
  for pid in "${!processes[@]}"; do
    kill "-$1" -- "${2-}$pid" 2>/dev/null || true
  done
}

# Runs all processes to their end; sets `code` to the exit code of the first that failed, or to 0.
run_all() {
  local i output status ended number timer='' printers=()
  choose_port
  code=0
  for ((i = 0; i < count && !stopping; i++)); do
    set_command "$i"
    # Ctrl-C must not cost the last lines.
    exec {output}> >(trap '' HUP INT TERM && exec sed -u "s/^/[$i] /")
    printers+=($!)
    "${command[@]}" >&"$output" 2>&1 </dev/null &
    processes[$!]=$i
    exec {output}>&-
  done
  while ((${#processes[@]})); do
    status=0
    # Bash would report deaths by signals in its own way.
    wait -n -p ended "${!processes[@]}" $timer 2>/dev/null || status=$?
    if [[ -z ${ended-} ]]; then # a trap ran
      continue
    elif [[ $ended == "$timer" ]]; then
      timer=
      send KILL -
      continue
    fi
    number=${processes[$ended]}
    unset "processes[$ended]"
    # What it left behind, such as data workers, would hold its devices and its output.
    kill -KILL -- "-$ended" 2>/dev/null || true
    if ((status && !code)); then
      code=$status
      echo "local.sh: process $number ended with exit code $code" >&2
      # After 75 the others are leaving by themselves.
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

processes=() # the number of each, by its process id
stopping=0
trap 'stopping=1; send TERM' HUP TERM
trap 'stopping=1; send INT' INT
restarts=0
while :; do
  run_all
  ((code == 75 && !stopping && restarts < ${RESTARTS:-10})) || exit "$code"
  restarts=$((restarts + 1))
  echo "local.sh: starting again, $restarts of ${RESTARTS:-10}" >&2
done
