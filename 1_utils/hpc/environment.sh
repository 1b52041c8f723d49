# shellcheck shell=bash
# For submit.sh and stage.sh to source: reads site.env, and says how Python runs here.
#
#   repository         this checkout
#   read_site NAME …   read site.env; refuse it where one of these values still is a placeholder
#   leave_out_what_is_not_here    for a plan on another machine: ignore modules, image or environment that it lacks
#   use_environment    load modules, choose the caches, and set the array `python`: the command that runs a script

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

read_site() {
    local site="$repository/1_utils/hpc/site.env" name value
    [ -r "$site" ] || fail "$site: cannot be read; restore it from the repository"
    # shellcheck source=1_utils/hpc/site.env
    source "$site"
    for name in "$@"; do
        value="${name}[*]"
        if [[ "${!value:-}" == *"<"*">"* ]]; then
            fail "$site: $name still holds the placeholder ${!value}; replace it, or make it empty"
        fi
    done
}

leave_out_what_is_not_here() {
    if ! find_module; then MODULES=""; fi
    if ! { [ -e "$CONTAINER" ] && find_runtime; }; then CONTAINER=""; fi
    if ! [ -x "$VENV/bin/python" ]; then VENV=""; fi
}

find_runtime() { # sets `runtime`
    runtime=$(command -v apptainer || command -v singularity)
}

# shellcheck disable=SC2034 # `python` is for those who source this
use_environment() {
    load_modules
    choose_caches
    if [ -n "$CONTAINER" ]; then
        [ -e "$CONTAINER" ] || fail "CONTAINER=$CONTAINER in site.env: no such image"
        find_runtime || fail "CONTAINER is set in site.env, but neither apptainer nor singularity is on $(hostname)"
        local binds=(--bind "$repository" --bind "$PWD")
        if [ -n "${HF_HOME:-}" ]; then binds+=(--bind "$HF_HOME"); fi
        if [ -n "${STAGE_NOTES:-}" ]; then binds+=(--bind "$STAGE_NOTES"); fi
        python=("$runtime" exec --nv "${binds[@]}" "${CONTAINER_OPTIONS[@]}" "$CONTAINER" python3)
        return
    fi
    local folder="$VENV"
    if [ -z "$folder" ] && [ -d "$repository/.venv" ]; then folder="$repository/.venv"; fi
    if [ -n "$folder" ]; then
        [ -x "$folder/bin/python" ] || fail "$folder: holds no bin/python on $(hostname); see VENV in site.env"
        export PATH="$folder/bin:$PATH"
    fi
    command -v python3 >/dev/null || fail "no python3 on $(hostname); set VENV, MODULES or CONTAINER in site.env"
    python=("$(command -v python3)")
}

find_module() { # is there a `module` command?
    local file
    for file in /etc/profile.d/{modules,lmod,z00_lmod,00-modulepath}.sh; do
        if ! declare -F module >/dev/null && [ -r "$file" ]; then
            # shellcheck disable=SC1090
            set +eu && source "$file" && set -eu
        fi
    done
    declare -F module >/dev/null
}

load_modules() {
    [ -n "$MODULES" ] || return 0
    find_module || fail "MODULES is set in site.env, but there is no \`module\` command on $(hostname)"
    set +u # module's own code reads unset variables
    # shellcheck disable=SC2086 # several names
    module load $MODULES || fail "module load $MODULES failed; \`module avail\` lists what there is"
    set -u
}

choose_caches() {
    if [ -n "$HF_CACHE" ]; then
        mkdir -p "$HF_CACHE" || fail "HF_CACHE=$HF_CACHE in site.env: cannot be made"
        export HF_HOME="$HF_CACHE"
    fi
    # Without a home to write in, everything that looks for ~/.cache or ~/.config is sent into the repository.
    if ! { [ -n "${HOME:-}" ] && [ -d "$HOME" ] && [ -w "$HOME" ]; }; then
        export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$repository/models/.cache}"
        export MPLCONFIGDIR="${MPLCONFIGDIR:-$XDG_CACHE_HOME/matplotlib}"
        mkdir -p "$MPLCONFIGDIR"
    fi
}
