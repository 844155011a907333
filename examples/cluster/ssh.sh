#!/usr/bin/env bash
# Train on several machines that are reached over ssh, without a scheduler; `ssh.sh --help` says how.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

usage() {
    cat <<HELP
usage: bash examples/cluster/ssh.sh --hosts FILE [options] [--] [arguments of examples/pretrain_cca_emu3.sh]

Starts one agent on each machine; its output comes with the machine's name before each line. If one ends with an error, all
end. Ctrl-C, SIGTERM and SIGUSR1 let the run finish its step, save and leave; a second Ctrl-C ends it at once. The same
command continues it. If this script is killed or loses a connection, the machines save and leave as well.

  --hosts FILE       a line for each machine: HOST [SLOTS]; SLOTS is its number of ranks (default: its number of GPUs), and
                     # begins a comment. ssh must reach each HOST without a question; the others reach the first by its name
  --directory PATH   the repository, at the same path on all machines (default: $here);
                     relative paths such as that of --config begin there
  --python PATH      on the machines (default: the repository's .venv/bin/python)
  --address ADDRESS  of the first machine as the others know it, where its name in FILE is only ssh's
  --port PORT        on the first machine, open to the others (default: one that is free)
  --env NAME=VALUE   set on the machines, such as NCCL_SOCKET_IFNAME=eth0; may be repeated
  --max-restarts N   attempts after a rank has died (default: 0)
  --help             this text

Example: bash examples/cluster/ssh.sh --hosts hosts.txt --config my.yaml --set training.train_iters=1000
HELP
}

refuse() {
    echo "ssh.sh: error: $1" >&2
    exit 2
}

hosts_file="" directory="$here" python="" address="" port="" max_restarts=0 variables=() config=""
while [ $# -gt 0 ]; do
    case "$1" in
    --help | -h)
        usage
        exit 0
        ;;
    --hosts | --directory | --python | --address | --port | --env | --max-restarts)
        [ $# -ge 2 ] || refuse "$1: its value is missing"
        case "$1" in
        --hosts) hosts_file="$2" ;;
        --directory) directory="$2" ;;
        --python) python="$2" ;;
        --address) address="$2" ;;
        --port) port="$2" ;;
        --env) variables+=("$2") ;;
        --max-restarts) max_restarts="$2" ;;
        esac
        shift 2
        ;;
    --)
        shift
        break
        ;;
    *) break ;; # the training program's from here on
    esac
done
python="${python:-$directory/.venv/bin/python}"
[ -n "$hosts_file" ] || refuse "--hosts: a file with a line for each machine is missing; --help says more"
[ -f "$hosts_file" ] || refuse "--hosts: $hosts_file is not there; it wants a line for each machine: HOST [SLOTS]"
[[ "$max_restarts" =~ ^[0-9]+$ ]] || refuse "--max-restarts: '$max_restarts' is not a number"
[[ "$port" =~ ^[0-9]*$ ]] || refuse "--port: '$port' is not a number"
for variable in "${variables[@]}"; do
    [[ "$variable" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "--env: '$variable' is not NAME=VALUE"
done
previous=""
for argument in "$@"; do
    [ "$previous" != --config ] || config="$argument"
    [ "${argument#--config=}" = "$argument" ] || config="${argument#--config=}"
    previous="$argument"
done

hosts=() slots=() number=0
while read -r host count rest || [ -n "$host" ]; do
    number=$((number + 1))
    [ -n "$host" ] || continue
    where="$hosts_file: line $number"
    [[ "$host" =~ ^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$ ]] || refuse "$where: '$host' is not the name of a machine"
    [[ "${count:-1}" =~ ^[1-9][0-9]*$ ]] || refuse "$where: SLOTS is '$count'; it wants HOST [SLOTS], SLOTS at least 1"
    [ -z "$rest" ] || refuse "$where: '$rest' is too much; it wants HOST [SLOTS]"
    [[ " ${hosts[*]} " != *" $host "* ]] || refuse "$where: $host stands there twice; one agent a machine starts all its ranks"
    hosts+=("$host")
    slots+=("${count:-gpu}")
done < <(sed 's/#.*//' "$hosts_file")
[ ${#hosts[@]} -gt 0 ] || refuse "--hosts: $hosts_file names no machine"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
connect=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15)

# A command for whatever shell the user has there: sh runs the script with these arguments.
remote() {
    printf 'exec sh -c'
    local part
    for part in "$@"; do printf " '%s'" "${part//\'/\'\\\'\'}"; done
}

# --- is everything there? -----------------------------------------------------------------------------------------------
# shellcheck disable=SC2016 # expanded on the machines
check='cd "$1" 2>/dev/null || { echo "$1 is not there; put the repository at one path, or name it by --directory"; exit 3; }
[ -f examples/cluster/agent.py ] || { echo "$1 is not the repository; --directory names it"; exit 3; }
command -v "$2" >/dev/null || { echo "no Python at $2; run make install there, or name it by --python"; exit 3; }
[ -z "$3" ] || [ -f "$3" ] || { echo "--config: $3 is not there (looked for in $1)"; exit 3; }
"$2" -c "import socket; s = socket.socket(); s.bind((\"\", 0)); print(s.getsockname()[1])"'
checks=()
for index in "${!hosts[@]}"; do
    "${connect[@]}" "${hosts[index]}" "$(remote "$check" sh "$directory" "$python" "$config")" \
        >"$folder/check.$index" 2>"$folder/check.$index.err" </dev/null &
    checks+=($!)
done
problems=0
for index in "${!hosts[@]}"; do
    code=0
    wait "${checks[index]}" || code=$?
    [ "$code" != 0 ] || continue
    problems=$((problems + 1))
    line="$(tail -n 1 "$folder/check.$index")"
    [ "$code" != 255 ] || line="not reached: $(tail -n 1 "$folder/check.$index.err")"
    echo "ssh.sh: error: ${hosts[index]}: ${line:-$(tail -n 1 "$folder/check.$index.err")}" >&2
done
[ "$problems" = 0 ] || exit 2
port="${port:-$(tail -n 1 "$folder/check.0")}"
address="${address:-${hosts[0]#*@}}"

# --- start --------------------------------------------------------------------------------------------------------------
# The agent's keeper reads names of signals from here; when nothing more can come, the run is to save and leave.
# shellcheck disable=SC2016 # expanded on the machines
keep='cd "$1" && shift || exit 3
exec 3<&0
"$@" </dev/null 3<&- &
agent=$!
{ while read -r name; do kill -s "$name" "$agent"; done; kill -s TERM "$agent"; } <&3 2>/dev/null >/dev/null &
keeper=$!
exec 3<&-
wait "$agent"; status=$?
kill "$keeper" 2>/dev/null
exit "$status"'

close_pipes() { # held open by a child as well, they would not end when this script does
    local pipe
    for pipe in "${pipes[@]}"; do exec {pipe}>&-; done
}

show() { # prefixes each line, and keeps the one that says how the machine ended
    local line
    close_pipes
    while IFS= read -r line || [ -n "$line" ]; do
        printf '[%s] %s\n' "$1" "$line"
        case "$line" in
        "megatron_cca: "*) echo "$line" >"$2" ;;
        "agent.py on "*) [ -s "$2" ] || echo "$line" >"$2" ;;
        esac
    done
}

pipes=() jobs=()
for index in "${!hosts[@]}"; do
    mkfifo "$folder/pipe.$index"
    exec {pipe}<>"$folder/pipe.$index"
    pipes+=("$pipe")
done
# Each in a process group of its own: a Ctrl-C in the terminal is for this script alone.
set -m
for index in "${!hosts[@]}"; do
    agent=(env OMP_NUM_THREADS=1 "${variables[@]}" "$python" examples/cluster/agent.py
        --nnodes="${#hosts[@]}" --nproc-per-node="${slots[index]}" --max-restarts="$max_restarts"
        --rdzv-backend=c10d --rdzv-id="${folder##*.}" --rdzv-endpoint="$address:$port" --rdzv-conf="is_host=$((index == 0))"
        examples/pretrain_cca_emu3.sh "$@")
    {
        exec <"$folder/pipe.$index"
        close_pipes
        code=0
        "${connect[@]}" "${hosts[index]}" "$(remote "$keep" sh "$directory" "${agent[@]}")" || code=$?
        echo "$code" >"$folder/status.$index"
    } 2>&1 | show "${hosts[index]}" "$folder/last.$index" &
    jobs+=($!)
done
set +m

# --- until all have ended -----------------------------------------------------------------------------------------------
tell() { for pipe in "${pipes[@]}"; do echo "$1" >&"$pipe"; done; }
asked=0
# shellcheck disable=SC2329 # called by the traps
ask() {
    asked=$((asked + 1))
    case "$asked" in
    1)
        echo "ssh.sh: $2: the run finishes its step, saves and leaves" >&2
        tell "$1"
        ;;
    2)
        echo "ssh.sh: $2 again: the run is ended at once" >&2
        tell HUP # which ranks do not heed, and die of
        ;;
    esac
}
trap 'ask TERM Ctrl-C' INT
trap 'ask TERM SIGTERM' TERM
trap 'ask TERM SIGHUP' HUP
trap 'ask USR1 SIGUSR1' USR1

first="" status=0 ended_at=0 told=""
while :; do
    running=0
    for index in "${!hosts[@]}"; do
        if ! kill -0 "${jobs[index]}" 2>/dev/null; then
            code="$(cat "$folder/status.$index" 2>/dev/null || echo 1)"
            if [ "$code" != 0 ] && [ -z "$first" ]; then
                first="$index" status="$code" ended_at=$SECONDS
            fi
        else
            running=$((running + 1))
        fi
    done
    [ "$running" != 0 ] || break
    if [ -n "$first" ]; then
        # Those that were asked to go end together, after a save; from others nothing good can come.
        case "$status" in 138 | 143) patience=600 ;; *) patience=5 ;; esac
        if [ -z "$told" ] && [ $((SECONDS - ended_at)) -ge "$patience" ]; then
            tell HUP
            told=yes
        elif [ $((SECONDS - ended_at)) -ge $((patience + 30)) ]; then
            for job in "${jobs[@]}"; do kill -KILL -- "-$job" 2>/dev/null || true; done
        fi
    fi
    sleep 0.2
done

[ "$status" != 0 ] || exit 0
what="exit status $status"
[ "$status" != 255 ] || what="the connection was lost"
last="$(cat "$folder/last.$first" 2>/dev/null || true)"
echo "ssh.sh: ${hosts[first]} ended first: $what${last:+: $last}" >&2
exit "$status"
