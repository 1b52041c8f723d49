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
#   --shards N        array tasks of each script of stage 2, one GPU each (default 1)
#   --text_engine vllm   a job in which vLLM writes the responses, before stage 2 captures
#   --stages LIST     of 0,2,3,4,5,report (default 2,3,4,5,report); 0 checks the prompt file first
# shellcheck disable=SC2317 # the functions that the plan calls look unreachable
set -euo pipefail
# shellcheck source=1_utils/hpc/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

mode=submit original=("$@")
for word in "$@"; do
    case $word in
        --) break ;;
        --dry-run | --dry_run) mode=dry-run ;;
        --test-only | --test_only) mode=test-only ;;
        -h | --help)
            sed -n '2,/^# shellcheck/{/^# shellcheck/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
    esac
done

scalars=(ACCOUNT PARTITION GPU_PARTITION QOS GPU_GRES CAPTURE_GRES)
read_site "${scalars[@]}" STAGE_TIME STAGE_MEM SBATCH_OPTIONS GPU_OPTIONS MODULES VENV CONTAINER CONTAINER_OPTIONS HF_CACHE
if [ "$mode" = dry-run ]; then
    leave_out_what_is_not_here
else
    command -v sbatch >/dev/null || fail "there is no sbatch on $(hostname); run this on a login node of the cluster"
fi
use_environment

# --- the plan: Python writes the lines that this script runs, because inside a container it cannot reach Slurm

describe_site() { # NAME=value, a line each
    local name stage
    for name in "${scalars[@]}"; do echo "$name=${!name}"; done
    for stage in {0..5}; do
        echo "STAGE_TIME$stage=${STAGE_TIME[stage]:-}"
        echo "STAGE_MEM$stage=${STAGE_MEM[stage]:-}"
    done
    printf 'SBATCH_OPTIONS=%s\n' "${SBATCH_OPTIONS[@]}"
    printf 'GPU_OPTIONS=%s\n' "${GPU_OPTIONS[@]}"
    squeue --noheader --user "$(id -un)" --format '%F|%j|%k' 2>/dev/null | sed 's/^/QUEUE=/' || true
}

ids=() submitted=() refused=() run=""

fetch() { # model, options of fetch_models.py
    [ "$mode" = submit ] || return 0
    echo "model $1"
    "${python[@]}" "$repository/1_utils/run_scripts/fetch_models.py" "${@:2}" >/dev/null
}

job() { # step number, script, folder, words of sbatch: sets ids[number]
    local answer
    if [ "$mode" = test-only ]; then
        sbatch --test-only "${@:4}" || refused+=("$2")
        return
    fi
    mkdir -p logs
    rm -f "$3/.job.$2."*
    answer=$(sbatch "${@:4}") ||
        fail "Slurm did not take $2 (its reason is above); what was submitted before it stays: ${submitted[*]:-nothing}"
    ids[$1]=${answer%%;*}
    submitted+=("${ids[$1]}")
    echo "submitted: ${ids[$1]}  $2  $3"
}

lines=$(describe_site | "${python[@]}" "$repository/1_utils/run_scripts/cluster_plan.py" --site "$@")
if [ "$mode" = dry-run ]; then
    echo "$lines"
    exit
fi
eval "$lines"

if [ "${#refused[@]}" -gt 0 ]; then
    echo "error: Slurm would not take: ${refused[*]} (its reasons are above)" >&2
    exit 1
elif [ "$mode" = test-only ]; then
    echo "Slurm would take all of these; nothing was submitted"
elif [ "${#ids[@]}" = 0 ]; then
    echo "everything is done"
else
    printf '\nwatch    squeue --me; logs are in %s/logs\n        ' "$PWD"
    printf ' %q' "${python[@]}" "$repository/1_utils/run_scripts/run_status.py" "$run"
    printf '\nresume  ' && printf ' %q' "${BASH_SOURCE[0]}" "${original[@]}" && printf '   # submits what is missing\n'
    echo "cancel   scancel ${ids[*]}"
fi
