#!/usr/bin/env bash
# Start a real SLURM on this machine, on loopback alone: a controller and two nodes, n1 and n2, with
# two CPUs and two make-believe GPUs each. Needs root and Debian's packages slurm-wlm and munge.
#
#   bash tests/slurm_cluster.sh up FOLDER proctrack/cgroup    # or proctrack/linuxproc
#   export SLURM_CONF=FOLDER/slurm.conf
#   bash tests/slurm_cluster.sh down FOLDER
set -euo pipefail
folder=$2

stop() {
    for name in slurmd.n1 slurmd.n2 slurmctld; do
        if [ -s "$folder/$name.pid" ]; then
            kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
        fi
    done
}
if [ "$1" = down ]; then
    stop
    exit
fi

mkdir -p "$folder"/{state,spool.n1,spool.n2}
touch "$folder"/gpu{0,1,2,3}  # a GPU of the configuration is any file; nothing looks into it
host=$(hostname)
for node in n1 n2; do
    grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
done

cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmctldPort=16817
ProctrackType=$3
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=30
KillWait=30
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
cat >"$folder/gres.conf" <<CONF
NodeName=n1 Name=gpu File=$folder/gpu[0-1]
NodeName=n2 Name=gpu File=$folder/gpu[2-3]
CONF
cat >"$folder/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupAutomount=yes
CgroupMountpoint=/sys/fs/cgroup
CONF

export SLURM_CONF=$folder/slurm.conf
mkdir -p /run/munge
chown munge:munge /run/munge
pgrep -x munged >/dev/null ||
    setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged --force
slurmctld -i
sleep 1
slurmd -N n1
slurmd -N n2
for _ in $(seq 50); do
    [ "$(sinfo --noheader --format=%T)" = idle ] && exit
    sleep 0.2
done
sinfo
exit 1
