#!/usr/bin/env bash
# What every job does; the .slurm files call it, nobody else needs to:
#
#   stage.sh [--resumes] [--process-per-gpu] SCRIPT ARGUMENTS…
#
# It reads site.env, runs the script, and passes its exit code through. Before the time limit Slurm sends SIGUSR1:
# a script that --resumes then finishes what is under way, and this array task alone goes back into the queue.
# So does one whose process was killed (a node short of memory), three times at most. With --process-per-gpu, several
# GPUs on the node get one process each (RANK, LOCAL_RANK and WORLD_SIZE as `accelerate launch` sets them), unless the
# arguments say --device_map.
#
# It leaves .job.<script>.<task> in the folder that the script writes to (--output_dir, --results_dir, that of
# --output_csv, or --run_dir), for run_status.py: what happened last, and the log. The stamp of a step that is done is the script's.
# shellcheck disable=SC2317 # the functions that traps call look unreachable
set -euo pipefail
# shellcheck source=1_utils/hpc/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

STOPPED=75    # exit code of a script that a signal stopped: it has kept everything, and goes on when called again
KILLED=137    # by SIGKILL
BY_USR1=138   # by SIGUSR1, before it could handle it: nothing had begun
KILLED_MOST=3 # a process that is killed each time is not tried for ever
MARGIN=20     # seconds before the time limit at which a task that is still not finished is put back all the same

resumes="" per_gpu=""
while [[ "${1:-}" == --* ]]; do
    case $1 in
        --resumes) resumes=1 ;;
        --process-per-gpu) per_gpu=1 ;;
        *) fail "stage.sh: unknown option $1" ;;
    esac
    shift
done
script=${1:?stage.sh: which script?}
shift

name=$(basename "$script" .py)
task="${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-0}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
restarts=${SLURM_RESTART_COUNT:-0}
log_file=$(readlink "/proc/$$/fd/1" || true)

say() {
    echo "[$(date '+%F %T')] $*"
}

place="" run="" last=""
for word in "$@"; do
    if [[ "$word" == --*=* ]]; then last=${word%%=*} word=${word#*=}; fi
    case $last in
        --output_dir) place=$word ;;
        --results_dir) place=${place:-$word} ;;
        --run_dir) run=${run:-$word} ;;
        --output_csv) place=${place:-$(dirname "$word")} ;; # check_prompts.py names its one file
    esac
    last=$word
done
place=${place:-$run}

record() { # what happened to this task, for run_status.py
    [ -n "$place" ] && mkdir -p "$place" || return 0
    printf '%s\n' "task=$task" "state=$*" "time=$(date +%s)" "log=$log_file" \
        >"$place/.job.$name.${SLURM_ARRAY_TASK_ID:-0}" || true
}

# --- signals

signalled="" near_limit="" watchdog=""

signal_processes() { # each leaves its own number: in a container, a signal must not end what started it
    local file
    for file in "$STAGE_NOTES"/*; do
        if [ -s "$file" ]; then kill -s "$1" "$(cat "$file")" 2>/dev/null || true; fi
    done
}

on_time_limit() {
    signalled=1
    [ -z "$near_limit" ] || return 0
    near_limit=1
    if [ -z "$resumes" ]; then
        say "the time limit is near, and $name starts from the beginning each time: give it more (sbatch --time=…)"
        return 0 # a bare return in a trap passes on the status from before the trap
    fi
    say "the time limit is near: $name finishes what is under way, then this task goes back into the queue"
    signal_processes USR1
    local left
    if may_restart "$MAX_RESTARTS" && left=$(seconds_left); then
        (sleep "$((left > MARGIN ? left - MARGIN : 0))" && put_back "put back at the time limit, unfinished") &
        watchdog=$!
    fi
}

on_terminate() { # preemption, or scancel: Slurm decides what becomes of the job
    signalled=1
    say "asked to end: $name keeps what it has"
    signal_processes TERM
}

job_field() { # what Slurm says of this task
    scontrol show job "$task" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | head -n 1
}

seconds_left() {
    local end
    end=$(job_field EndTime)
    end=$(date -d "$end" +%s 2>/dev/null) && echo $((end - $(date +%s)))
}

may_restart() { # fewer than $1 restarts so far?
    [ -n "${SLURM_JOB_ID:-}" ] && [ "$restarts" -lt "$1" ]
}

put_back() {
    local state
    state=$(job_field JobState)
    if [ -n "$state" ] && [ "$state" != RUNNING ]; then # a job that was cancelled is not brought back to life
        say "Slurm has ended task $task ($state): it does not go back into the queue"
        return 0
    fi
    say "task $task goes back into the queue"
    record "$@"
    scontrol requeue "$task" || say "Slurm did not take it back: submit it again, and it goes on from there"
}

# --- the job

read_site MODULES VENV CONTAINER CONTAINER_OPTIONS HF_CACHE
STAGE_NOTES=$(mktemp -d)
export STAGE_NOTES
trap 'rm -rf "$STAGE_NOTES"' EXIT
use_environment
[ -f "$repository/$script" ] || fail "$repository/$script: no such script"
if [ "$OFFLINE" = 1 ]; then export HF_HUB_OFFLINE=1; fi
if [ -n "${SERVE_COMMAND:-}" ]; then export SERVE_COMMAND; fi
processes=1
if [ -n "$per_gpu" ] && [[ " $* " != *" --device_map"* ]]; then processes=${SLURM_GPUS_ON_NODE:-1}; fi
threads=$((${SLURM_CPUS_PER_TASK:-1} / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL="${TQDM_MININTERVAL:-30}" # a log is read while it is written, and not too long

say "$name on $(hostname), job $task, start $((restarts + 1))"
printf '  $ python %s' "$script" && printf ' %q' "$@" && echo
record running
trap on_time_limit USR1
trap on_terminate TERM
# The last word of `python` is the interpreter, the words before it start a container.
last=$((${#python[@]} - 1)) children=()
for ((rank = 0; rank < processes; rank++)); do
    if [ "$processes" -gt 1 ]; then export RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$processes; fi
    # shellcheck disable=SC2016
    "${python[@]:0:last}" bash -c 'echo $$ >"$0" && exec "$@"' \
        "$STAGE_NOTES/$rank" "${python[last]}" "$repository/$script" "$@" &
    children+=($!)
done
codes=()
for child in "${children[@]}"; do
    signalled=1
    while [ -n "$signalled" ]; do # a trap interrupts `wait`, which then returns the signal and not the exit code
        signalled="" code=0
        wait "$child" || code=$?
    done
    codes+=("$code")
done
trap '' USR1 TERM
if [ -n "$watchdog" ]; then kill "$watchdog" 2>/dev/null || true; fi
# The gravest exit code. A stopped process must go on, even if prompts of another failed (1); one that ended with wrong
# usage (2 ...) would only fail again.
code=$(for code in "${codes[@]}"; do
    case $code in
        0 | 1) echo "$code $code" ;;
        "$STOPPED") echo "2 $code" ;;
        "$BY_USR1") echo "4 $code" ;;
        "$KILLED") echo "5 $code" ;;
        *) echo "3 $code" ;;
    esac
done | sort | tail -n 1 | cut -d ' ' -f 2)

if [ "$code" = 0 ]; then
    record "done"
    say "$name is done"
elif [ -n "$resumes" ] && [[ "$code" == "$STOPPED" || "$code" == "$BY_USR1" ]]; then
    say "$name was stopped; what it has is kept, and the same command goes on from there"
    record "stopped before the end"
    if [ -n "$near_limit" ] && may_restart "$MAX_RESTARTS"; then put_back "put back at the time limit"; fi
elif [ "$code" = "$KILLED" ]; then
    say "$name was killed: out of memory? (sbatch --mem=… gives it more)"
    record "killed"
    if may_restart "$KILLED_MOST"; then put_back "killed and put back"; fi
else
    say "$name ended with exit code $code, the reason is above; jobs that need its success are cancelled"
    record "exit code $code"
fi
exit "$code"
