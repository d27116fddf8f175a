#!/usr/bin/env bash
# A real Slurm on loopback: two virtual nodes with 8 GPUs each (fake device files), accounting, an enforced account.
# Usage: tests/slurm/cluster.sh install | start DIR | stop DIR
#   install  Debian packages (needs root)
#   start    everything below DIR; prints the environment to source; about ten seconds
#   stop     ends what start started, by pid file
set -euo pipefail

usage() {
  sed -n '2,6p' "$0" >&2
  exit 2
}

install_packages() {
  local tool missing=0
  for tool in sbatch slurmctld slurmd slurmdbd munged mariadbd; do
    command -v "$tool" >/dev/null || missing=1
  done
  [ "$missing" -eq 1 ] || return 0
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    slurm-wlm slurm-client slurmdbd munge mariadb-server
}

wait_for() { # wait_for SECONDS WHAT COMMAND...: until it succeeds
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || { echo "$what did not come up; logs are in $dir" >&2; return 1; }
    sleep 0.2
  done
}

write_configuration() {
  cat >"$dir/slurm.conf" <<CONF
ClusterName=athena
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=16819
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
NodeName=ag0001,ag0002 NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=16 RealMemory=20000 Gres=gpu:8
PartitionName=plgrid-gpu-a100 Nodes=ag0001,ag0002 Default=YES MaxTime=48:00:00 PriorityTier=1
PartitionName=urgent Nodes=ag0001,ag0002 PriorityTier=10 PreemptMode=OFF MaxTime=48:00:00
CONF
  # Count-only and regular files are refused: a GPU is a character device.
  mkdir -p "$dir/dev"
  for i in 0 1 2 3 4 5 6 7; do [ -e "$dir/dev/fakegpu$i" ] || mknod "$dir/dev/fakegpu$i" c 1 3; done
  cat >"$dir/gres.conf" <<CONF
AutoDetect=off
NodeName=ag0001 Name=gpu File=$dir/dev/fakegpu[0-7] Flags=nvidia_gpu_env
NodeName=ag0002 Name=gpu File=$dir/dev/fakegpu[0-7] Flags=nvidia_gpu_env
CONF
  cat >"$dir/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdPort=16819
SlurmUser=root
LogFile=$dir/slurmdbd.log
PidFile=$dir/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16336
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$dir/slurmdbd.conf"
}

start() {
  # From nothing each time: jobs and accounts of an earlier cluster do not belong to this one.
  rm -rf "$dir/state" "$dir/db" "$dir"/spool.*
  mkdir -p "$dir/state"
  write_configuration
  export SLURM_CONF="$dir/slurm.conf"
  # sacctmgr looks for munge's socket at its usual place.
  mkdir -p /run/munge && chmod 755 /run/munge
  dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
  chmod 600 "$dir/munge.key"
  munged --force --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
    --seed-file="$dir/munged.seed"
  mariadb-install-db --no-defaults --user=root --datadir="$dir/db" --auth-root-authentication-method=normal \
    --skip-test-db >"$dir/mariadb-install.log" 2>&1
  mariadbd --no-defaults --user=root --datadir="$dir/db" --bind-address=127.0.0.1 --port=16336 \
    --socket="$dir/db.sock" --pid-file="$dir/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 \
    >"$dir/mariadbd.log" 2>&1 &
  wait_for 30 mariadbd mariadb --no-defaults -uroot --socket="$dir/db.sock" -e "select 1"
  mariadb --no-defaults -uroot --socket="$dir/db.sock" -e \
    "create database if not exists slurm_acct_db; create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
     create user if not exists 'slurm'@'localhost' identified by 'slurm';
     grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1'; grant all on slurm_acct_db.* to 'slurm'@'localhost';"
  slurmdbd
  wait_for 30 slurmdbd sacctmgr -n list cluster
  # Before any job: associations are enforced.
  sacctmgr -i -Q add cluster athena >/dev/null 2>&1 || true
  sacctmgr -i -Q add account plgkvquant-gpu-a100 Cluster=athena Description=kvquant Organization=kvquant >/dev/null
  sacctmgr -i -Q add user "$(id -un)" Account=plgkvquant-gpu-a100 Cluster=athena >/dev/null
  slurmctld
  slurmd -N ag0001
  slurmd -N ag0002
  wait_for 30 "two nodes" bash -c '[ "$(sinfo -h -N -p plgrid-gpu-a100 -t idle | wc -l)" -eq 2 ]'
  echo "export SLURM_CONF=$dir/slurm.conf SLURM_ACCOUNT=plgkvquant-gpu-a100"
}

stop() {
  local name pid
  for name in slurmd.ag0001 slurmd.ag0002 slurmctld slurmdbd mariadbd munged; do
    [ -f "$dir/$name.pid" ] || continue
    pid=$(cat "$dir/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

case "${1:-}" in
  install) install_packages ;;
  start | stop)
    [ $# -eq 2 ] || usage
    dir=$(mkdir -p "$2" && cd "$2" && pwd)
    "$1"
    ;;
  *) usage ;;
esac
