#!/usr/bin/env bash
# This host's part of a job. Run the same command on every host, from the same source tree:
#
#   HEAD=node1 NODES=2 tools/cluster/host.sh RUN_FOLDER CONFIG [--FIELD VALUE ...]
#
# The first host (HEAD) is where the launchers meet; RUN_FOLDER is on storage that all hosts share.
# SIGTERM or SIGUSR1 to the launcher of any host: the job saves and ends; the same commands resume.
#
#   HEAD      name or address of the first host          [localhost]
#   NODES     hosts of the job                           [1]
#   RANKS     ranks on this host                         [its GPUs; 1 without any]
#   PORT JOB  where and under which name launchers meet  [29400 earlyfuse]
#   RESTARTS  of the ranks after one has failed; none    [3]
#             after a config was refused (status 2)
#   NETWORK   interface that joins the hosts, as ib0     [that of the host's name]
#   LAUNCHER  PROGRAM                                    [python -m earlyfuse.tools.launch; train.py]
set -euo pipefail
if (($# < 2)); then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
run=$1 config=$2
shift 2
program=${PROGRAM:-train.py}
if [[ ! -f $program ]]; then
  echo "$program is not in $PWD; start in the root of the source tree, or set PROGRAM" >&2
  exit 2
fi
# where no environment is active, as in a shell by ssh: that of make setup
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x .venv/bin/python ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}

# The ranks share the host's cores: more threads than that wait for one another, and the launcher's
# default of one leaves cores idle where the CPU computes.
cores=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
# NCCL's own words on a failed connection, in the log of the rank; by default it says nothing.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# On hosts with several networks, gloo takes the one that the host's name resolves to and NCCL the
# first that is up; both may be the slow one, or one that does not reach the other hosts.
if [[ -n ${NETWORK:-} ]]; then
  export GLOO_SOCKET_IFNAME=$NETWORK NCCL_SOCKET_IFNAME=$NETWORK
fi

# words of LAUNCHER are split on purpose: it is a command with arguments
exec ${LAUNCHER:-python -m earlyfuse.tools.launch} \
  --nnodes="${NODES:-1}" --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29400}" \
  --rdzv-id="${JOB:-earlyfuse}" "$program" "$config" --dump_folder "$run" "$@"
