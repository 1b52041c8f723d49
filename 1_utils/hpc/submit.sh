#!/usr/bin/env bash
# The whole pipeline as Slurm jobs that wait for each other. Edit 1_utils/hpc/site.env once, then:
#
#   1_utils/hpc/submit.sh --shards 4 -- --model_name google/gemma-2-9b-it --prompt_file 0_data/maths.json --run_name gemma
#
# What follows `--` are the arguments of 1_utils/run_scripts/run_pipeline.py. The same command again submits only what is
# missing: what is done is left alone, what is in the queue stays there.
#
#   --dry-run         a table of the jobs, on any machine; submit, fetch and write nothing
#   --test-only       let Slurm check every job (sbatch --test-only); submit, fetch and write nothing
#   --verbose         with --dry-run: the commands, too
#   --shards N        array tasks of stage 2, one GPU each (default 1)
#   --stages LIST     of 0,2,3,4,5,report (default 2,3,4,5,report); 0 checks the prompt file first
set -euo pipefail
# shellcheck source=1_utils/hpc/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

# --- options

mode=submit shards=1 stages=2,3,4,5,report verbose=""
original=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run | --dry_run) mode=dry-run ;;
        --test-only | --test_only) mode=test-only ;;
        --verbose) verbose=1 ;;
        --shards | --stages)
            [ $# -gt 1 ] || fail "$1 needs a value; see submit.sh --help"
            if [ "$1" = --shards ]; then shards=$2; else stages=$2; fi
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) fail "submit.sh does not know $1; the pipeline's arguments come after --" ;;
    esac
    shift
done
[[ "$shards" =~ ^[1-9][0-9]*$ ]] || fail "--shards $shards: give a whole number from 1 up"
[ $# -gt 0 ] || fail "no arguments for the pipeline; for example: submit.sh -- --model_name … --prompt_file … --run_name …"

# --- the plan

read_site ACCOUNT PARTITION GPU_PARTITION QOS GPU_GRES CAPTURE_GRES STAGE_TIME STAGE_MEM SBATCH_OPTIONS GPU_OPTIONS \
    MODULES VENV CONTAINER CONTAINER_OPTIONS HF_CACHE
plan_options=()
if [ "$mode" = dry-run ]; then
    leave_out_what_is_not_here
    plan_options=(--sizes)
else
    command -v sbatch >/dev/null || fail "there is no sbatch on $(hostname); run this on a login node of the cluster"
fi
use_environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${python[@]}" "$repository/1_utils/run_scripts/cluster_plan.py" --fields "${plan_options[@]}" --stages "$stages" \
    -- "$@" >"$work/plan"

models=() revisions=() stems=() files=() folders=() states=() sizes=() afters=() any_afters=() counts=() all_words=()
kind="" name="" revision="" stem="" file="" folder="" state="" size="" after="" any_after="" count="" word=""
read_field() { IFS= read -r -d '' "$1"; }
while read_field kind; do
    if [ "$kind" = model ]; then
        read_field name && read_field revision
        models+=("$name") revisions+=("$revision")
        continue
    fi
    read_field stem && read_field file && read_field folder && read_field state && read_field size
    read_field after && read_field any_after && read_field count
    stems+=("$stem") files+=("$file") folders+=("$folder") states+=("$state") sizes+=("$size")
    afters+=("$after") any_afters+=("$any_after") counts+=("$count")
    for ((i = 0; i < count; i++)); do
        read_field word
        all_words+=("$word")
    done
done <"$work/plan"

in_queue() { # id of a job of this name for this folder that Slurm still has
    command -v squeue >/dev/null || return 0
    { squeue --noheader --user "$(id -un)" --format '%F|%j|%k' 2>/dev/null || true; } |
        awk -v name="$1" -v folder="$2" '{
            n = index($0, "|"); id = substr($0, 1, n - 1); rest = substr($0, n + 1)
            m = index(rest, "|"); comment = substr(rest, m + 1); sub(/ +$/, "", comment)
            if (substr(rest, 1, m - 1) == name && comment == folder) { found = id }
        } END { print found }'
}

# --- checks that cost nothing here and much after a night in the queue

check_arguments() { # the script's own parser, without running it
    "${python[@]}" -c '
import importlib, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
script = importlib.import_module(Path(sys.argv[0]).stem)
script.run_main(lambda argv: int(script.parse_args(argv) is None), sys.argv[1:])' "$@"
}

fetch_models() {
    local i options
    for ((i = 0; i < ${#models[@]}; i++)); do
        [ -n "${models[i]}" ] || continue
        echo "model ${models[i]}"
        options=(--model_name "${models[i]}")
        if [ -n "${revisions[i]}" ]; then options+=(--revision "${revisions[i]}"); fi
        case ${models[i]} in
            models/SmolLM2-135M-Instruct | models/all-MiniLM-L6-v2) # the embedded ones are made where they are missing
                if [ ! -d "${models[i]}" ]; then options=(--models_dir models); fi ;;
        esac
        "${python[@]}" "$repository/1_utils/run_scripts/fetch_models.py" "${options[@]}" >/dev/null
    done
}

# --- jobs

sbatch_options() { # sets the array `options` for job number $1
    options=(--parsable --job-name="${stems[$1]}" --comment="${folders[$1]}" --kill-on-invalid-dep=yes
        --output="$PWD/logs/${stems[$1]}_%A_%a.out")
    local partition=$PARTITION
    if [ -n "$ACCOUNT" ]; then options+=(--account="$ACCOUNT"); fi
    if [ -n "$QOS" ]; then options+=(--qos="$QOS"); fi
    options+=("${SBATCH_OPTIONS[@]}")
    if grep -q '^#SBATCH --gres=' "${files[$1]}"; then
        partition=${GPU_PARTITION:-$PARTITION}
        local gres=$GPU_GRES
        if [ "${stems[$1]}" = attn_act_logi ]; then gres=${CAPTURE_GRES:-$GPU_GRES}; fi
        case $gres in
            --*) options+=(--gres=none "$gres") ;; # not the .slurm file's way of asking for GPUs
            ?*) options+=(--gres="$gres") ;;
        esac
        options+=("${GPU_OPTIONS[@]}")
    fi
    local stage=${files[$1]%/hpc/*}
    stage=${stage##*/} stage=${stage%%_*}
    if [ -n "${STAGE_TIME[stage]:-}" ]; then options+=(--time="${STAGE_TIME[stage]}"); fi
    if [ -n "${STAGE_MEM[stage]:-}" ]; then options+=(--mem="${STAGE_MEM[stage]}"); fi
    if [ -n "$partition" ]; then options+=(--partition="$partition"); fi
    if [ "${stems[$1]}" = attn_act_logi ]; then options+=(--array="0-$((shards - 1))"); fi
}

add_dependency() { # on the jobs that number $1 waits for, where they are not done
    local number well="" any=""
    for number in ${afters[$1]}; do
        if [ -n "${ids[number]:-}" ]; then well+=":${ids[number]}"; fi
    done
    for number in ${any_afters[$1]}; do
        if [ -n "${ids[number]:-}" ]; then any+=":${ids[number]}"; fi
    done
    local wait_for="${well:+,afterok$well}${any:+,afterany$any}"
    if [ -n "$wait_for" ]; then options+=(--dependency="${wait_for#,}"); fi
}

setting() { # value of sbatch's --$2 for job number $1: the last among `options`, else what its file says
    local word value
    value=$(sed -n "s/^#SBATCH --$2=//p" "${files[$1]}" | tail -n 1)
    for word in "${options[@]}"; do
        if [[ "$word" == "--$2="* ]]; then value=${word#*=}; fi
    done
    echo "$value"
}

gpu_hours() { # $1 tasks with $2 GPUs for the time limit $3 (minutes, h:m:s, days-h:m:s)
    awk -v devices="$(($1 * $2))" -v limit="$3" 'BEGIN {
        days = split(limit, parts, "-") == 2 ? parts[1] : 0
        n = split(days ? parts[2] : limit, p, ":")
        hours = days || n == 3 ? p[1] + p[2] / 60 + p[3] / 3600 : p[1] / 60 + p[2] / 3600
        printf "%.1f", devices * (24 * days + hours) }'
}

row() { printf '%-6s %-22s %6s %12s %8s %10s %10s  %s\n' "$@"; }

print_row() { # job number $1 of a dry run
    local gpus tasks=1 hours="-" waits limit
    limit=$(setting "$1" time)
    gpus=$(setting "$1" gpus-per-node)
    gpus=${gpus:-$(setting "$1" gres)}
    if [ "${stems[$1]}" = attn_act_logi ]; then tasks=$shards; fi
    if [ -n "$gpus" ]; then
        gpus=${gpus##*:}
        [[ "$gpus" =~ ^[0-9]+$ ]] || gpus=1
        hours=$(gpu_hours "$tasks" "$gpus" "$limit")
        all_hours+=("$hours")
    fi
    waits=$(setting "$1" dependency)
    if [ "${#waits}" -gt 50 ]; then waits="${waits:0:47}..."; fi
    row "${ids[$1]}" "${stems[$1]}" "$tasks" "$limit" "$(setting "$1" mem)" "$hours" "${sizes[$1]}" "${waits:--}"
}

submit_one() { # job number $1 with its words in `words`: sets ids[$1]
    local answer
    sbatch_options "$1"
    case $mode in
        dry-run)
            ids[$1]="JOB$1"
            add_dependency "$1"
            print_row "$1"
            if [ -n "$verbose" ]; then
                printf '%s' "    ${ids[$1]}: sbatch" && printf ' %q' "${options[@]}" "${files[$1]}" "${words[@]}" && echo
            fi
            ;;
        test-only)
            # A dependency needs a job's number, which nothing has yet.
            sbatch --test-only "${options[@]}" "${files[$1]}" "${words[@]}" || refused+=("${stems[$1]}")
            ;;
        submit)
            add_dependency "$1"
            rm -f "${folders[$1]}/.job.${stems[$1]}."*
            answer=$(sbatch "${options[@]}" "${files[$1]}" "${words[@]}") ||
                fail "Slurm did not take ${stems[$1]} (its reason is above); what was submitted before it stays: ${submitted[*]:-nothing}"
            ids[$1]=${answer%%;*}
            submitted+=("${ids[$1]}")
            echo "submitted: ${ids[$1]}  ${stems[$1]}  ${folders[$1]}"
            ;;
    esac
}

ids=() submitted=() refused=() all_hours=() start=0
declare -A first_word
for ((n = 0; n < ${#stems[@]}; n++)); do
    first_word[$n]=$start
    start=$((start + counts[n]))
    [ "${states[n]}" = missing ] || continue
    [ -f "${files[n]}" ] || fail "${files[n]}: no such job file"
    script="${files[n]%/hpc/*}/run_scripts/${stems[n]}.py"
    [ -f "$script" ] || fail "$script: no such script; leave its stage out with --stages"
    check_arguments "$script" "${all_words[@]:${first_word[$n]}:${counts[n]}}"
done
if [ "$mode" = submit ]; then
    fetch_models
    mkdir -p logs
fi
if [ "$mode" = dry-run ]; then row job script tasks "time limit" memory GPU-hours disk "waits for"; fi
for ((n = 0; n < ${#stems[@]}; n++)); do
    words=("${all_words[@]:${first_word[$n]}:${counts[n]}}")
    if [ "${states[n]}" = "done" ]; then
        echo "done before: ${stems[n]}  ${folders[n]}"
        continue
    fi
    queued=$(in_queue "${stems[n]}" "${folders[n]}")
    if [ -n "$queued" ]; then
        ids[n]=$queued
        echo "in the queue: $queued  ${stems[n]}  ${folders[n]}"
    elif [ "${states[n]}" = missing ]; then
        submit_one "$n"
    fi
done

# --- what next

if [ "${#refused[@]}" -gt 0 ]; then
    echo "error: Slurm would not take: ${refused[*]} (its reasons are above)" >&2
    exit 1
fi
case $mode in
    dry-run)
        echo
        if [ "${#all_hours[@]}" -gt 0 ]; then
            sum=$(printf '%s\n' "${all_hours[@]}" | awk '{ sum += $1 } END { print sum }')
            echo "at most $sum GPU-hours: what all jobs use that run into their time limits"
        fi
        echo "nothing was submitted; --verbose shows the commands"
        ;;
    test-only) echo "Slurm would take all of these; nothing was submitted" ;;
    submit)
        if [ "${#ids[@]}" = 0 ]; then
            echo "everything is done"
            exit 0
        fi
        capture_folders=()
        for ((n = 0; n < ${#stems[@]}; n++)); do
            if [ "${stems[n]}" = attn_act_logi ]; then capture_folders+=("${folders[n]}"); fi
        done
        echo
        echo "watch    squeue --me; logs are in $PWD/logs"
        for folder in "${capture_folders[@]}"; do
            printf '        ' && printf ' %q' "${python[@]}" "$repository/1_utils/run_scripts/run_status.py" "$folder" && echo
        done
        printf 'resume  ' && printf ' %q' "${BASH_SOURCE[0]}" "${original[@]}" && printf '   # submits what is missing\n'
        echo "cancel   scancel ${ids[*]}"
        ;;
esac
