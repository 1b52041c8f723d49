#!/usr/bin/env bash
# A Slurm of its own for the tests: three small nodes with fake GPUs, all on this machine, under /tmp/error_interp_slurm.
#
#   tests/setup_slurm.sh          install what is missing (Debian or Ubuntu, as root) and start it; again: does nothing
#   tests/setup_slurm.sh --stop   stop what it started
#
# It has its own configuration, ports, munge socket and key, so a Slurm that the machine already has is not touched:
# whoever wants to talk to this one sets SLURM_CONF=/tmp/error_interp_slurm/slurm.conf.
set -euo pipefail

folder=${ERROR_INTERP_SLURM:-/tmp/error_interp_slurm}
marker="$folder/made_by_error_interp"
nodes=3
export SLURM_CONF="$folder/slurm.conf"
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

fail() {
    echo "error: $*" >&2
    exit 1
}

running() { # is the process of a pid file alive, no zombie, and still the one that wrote it?
    local id
    id=$(cat "$1" 2>/dev/null) && readlink "/proc/${id:-none}/exe" 2>/dev/null | grep -qE '/(munged|slurmctld|slurmd)'
}

stop_all() {
    [ -f "$marker" ] || fail "$folder: not made by this script; nothing was stopped"
    for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        if running "$file"; then kill "$(cat "$file")"; fi
    done
}

install_packages() {
    local wanted=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || wanted+=(slurm-wlm)
    command -v munged >/dev/null || wanted+=(munge)
    command -v shellcheck >/dev/null || wanted+=(shellcheck)
    [ "${#wanted[@]}" -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "missing: ${wanted[*]}; run this as root, or install them"
    command -v apt-get >/dev/null || fail "missing: ${wanted[*]}; install them (there is no apt-get here)"
    echo "installing ${wanted[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
}

make_folder() {
    if [ -e "$folder" ] && [ ! -f "$marker" ]; then
        fail "$folder: there, but not made by this script; remove it or set ERROR_INTERP_SLURM"
    fi
    mkdir -p "$folder"
    [ -O "$folder" ] || fail "$folder: belongs to another user; set ERROR_INTERP_SLURM to a folder of your own"
    chmod 755 "$folder"
    touch "$marker"
    mkdir -p "$folder/state"
}

write_configuration() {
    local cpus=8 user host
    user=$(id -un)
    host=$(hostname -s)
    cat >"$folder/slurm.conf" <<END
ClusterName=error_interp
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=27817
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until its old credential has expired (120 s unless told).
AuthInfo=socket=$folder/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
KillWait=5
MinJobAge=600
OverTimeLimit=0
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
GresTypes=gpu
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    for n in $(seq "$nodes"); do
        echo "NodeName=test$n NodeHostname=$host NodeAddr=127.0.0.1 Port=2782$n CPUs=$cpus RealMemory=500000 Gres=gpu:4"
    done >>"$folder/slurm.conf"
    printf 'AutoDetect=off\n' >"$folder/gres.conf"
    for device in null zero full random; do
        printf 'NodeName=test[1-%s] Name=gpu File=/dev/%s\n' "$nodes" "$device" >>"$folder/gres.conf"
    done
}

start_all() {
    if ! running "$folder/munged.pid"; then
        if [ ! -s "$folder/munge.key" ]; then
            (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
        fi
        rm -f "$folder/munge.socket" "$folder/munged.pid"
        munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
            --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    fi
    running "$folder/slurmctld.pid" || slurmctld -c
    for n in $(seq "$nodes"); do
        mkdir -p "$folder/spool-test$n"
        running "$folder/slurmd-test$n.pid" || slurmd -N "test$n"
    done
}

wait_until_idle() {
    for _ in $(seq 60); do
        if [ "$(sinfo --Node --noheader --format=%N --states=idle,mixed,allocated 2>/dev/null | wc -l)" = "$nodes" ]; then
            return 0
        fi
        sleep 0.5
    done
    tail --lines=5 "$folder"/*.log >&2
    fail "Slurm did not come up within 30 s; its logs are in $folder"
}

if [ "${1:-}" = "--stop" ]; then
    stop_all
    exit 0
fi
install_packages
make_folder
# The configuration of running daemons stays as it is: they and their clients must agree.
running "$folder/slurmctld.pid" || write_configuration
start_all
wait_until_idle
echo "Slurm for the tests is up: export SLURM_CONF=$SLURM_CONF"
