#!/usr/bin/env bash
# The whole pipeline as Slurm jobs that wait for each other. Edit 1_utils/hpc/site.env once, then:
#
#   1_utils/hpc/submit.sh --shards 4 -- --model_name google/gemma-2-9b-it --prompt_file 0_data/maths.json --run_name gemma
#
# What follows `--` are the arguments of 1_utils/run_scripts/run_pipeline.py. The same command again submits only what is
# missing: what is done is left alone, what is in the queue stays there.
#
#   --dry-run         print the commands; submit, fetch and write nothing
#   --test-only       let Slurm check every job (sbatch --test-only); submit, fetch and write nothing
#   --shards N        array tasks of stage 2, one GPU each (default 1)
#   --stages LIST     of 0,2,3,4,5,report (default 2,3,4,5,report); 0 checks the prompt file first
set -euo pipefail
# shellcheck source=1_utils/hpc/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
}

# --- options

mode=submit shards=1 stages=2,3,4,5,report
original=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run | --dry_run) mode=dry-run ;;
        --test-only | --test_only) mode=test-only ;;
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

read_site ACCOUNT PARTITION GPU_PARTITION QOS GPU_GRES CAPTURE_GRES SBATCH_OPTIONS GPU_OPTIONS \
    MODULES VENV CONTAINER CONTAINER_OPTIONS HF_CACHE
if [ "$mode" != dry-run ]; then
    command -v sbatch >/dev/null || fail "there is no sbatch on $(hostname); run this on a login node of the cluster"
fi
use_environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${python[@]}" "$repository/1_utils/run_scripts/cluster_plan.py" --fields --stages "$stages" -- "$@" >"$work/plan"

models=() revisions=() stems=() files=() folders=() states=() afters=() counts=() all_words=()
kind="" name="" revision="" stem="" file="" folder="" state="" after="" count="" word=""
read_field() { IFS= read -r -d '' "$1"; }
while read_field kind; do
    if [ "$kind" = model ]; then
        read_field name && read_field revision
        models+=("$name") revisions+=("$revision")
        continue
    fi
    read_field stem && read_field file && read_field folder && read_field state && read_field after && read_field count
    stems+=("$stem") files+=("$file") folders+=("$folder") states+=("$state") afters+=("$after") counts+=("$count")
    for ((i = 0; i < count; i++)); do
        read_field word
        all_words+=("$word")
    done
done <"$work/plan"

in_queue() { # id of a job of this name for this folder that Slurm still has
    command -v squeue >/dev/null || return 0
    squeue --noheader --user "$(id -un)" --format '%F|%j|%k' 2>/dev/null |
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
        if [ -n "$gres" ]; then options+=(--gres="$gres"); fi
        options+=("${GPU_OPTIONS[@]}")
    fi
    if [ -n "$partition" ]; then options+=(--partition="$partition"); fi
    if [ "${stems[$1]}" = attn_act_logi ]; then options+=(--array="0-$((shards - 1))"); fi
}

add_dependency() { # on the jobs that number $1 waits for, where they are not done
    local number wait_for=""
    for number in ${afters[$1]}; do
        if [ -n "${ids[number]:-}" ]; then wait_for+=":${ids[number]}"; fi
    done
    if [ -n "$wait_for" ]; then options+=(--dependency="afterok$wait_for"); fi
}

submit_one() { # job number $1 with its words in `words`: sets ids[$1]
    local answer
    sbatch_options "$1"
    case $mode in
        dry-run)
            ids[$1]="JOB$1"
            add_dependency "$1"
            printf '%s' "would submit ${ids[$1]}: sbatch" && printf ' %q' "${options[@]}" "${files[$1]}" "${words[@]}" && echo
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

ids=() submitted=() refused=() start=0
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
    dry-run) echo "nothing was submitted" ;;
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
