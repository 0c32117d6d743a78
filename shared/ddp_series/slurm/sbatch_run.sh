#!/usr/bin/env bash
# Step 4 on SLURM: one torchrun a host, one process a GPU. Typed in shared/ddp_series or at the root:
#   sbatch slurm/sbatch_run.sh 50 10                      50 epochs, a snapshot every 10
#   sbatch --nodes=4 slurm/sbatch_run.sh 50 10 --batch_size 64
# Flags of sbatch win over the lines below; what follows the script's name goes to multinode_torchrun.py.
# When the time is up the job ends; the same line resumes from the last snapshot.
#SBATCH --job-name=ddp-series
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

refuse() {
  printf 'sbatch_run.sh: %s\n' "$*" >&2
  exit 2
}
[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
  refuse "this is no SLURM job: type sbatch ${BASH_SOURCE[0]} 50 10"

# sbatch runs a copy of this file from a directory of its own: look from where it was typed, too.
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
typed=${SLURM_SUBMIT_DIR:-$PWD}
script=''
for folder in "$typed" "$typed/.." "$typed/shared/ddp_series" "$here/.."; do
  if [[ -f $folder/multinode_torchrun.py ]]; then
    script=$(CDPATH='' cd -- "$folder" && pwd -P)/multinode_torchrun.py
    break
  fi
done
[[ -n $script ]] || refuse "multinode_torchrun.py is not near $typed: type sbatch in shared/ddp_series"
venv=$(dirname -- "$script")/../../.venv/bin
[[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} || ! -d $venv ]] || PATH=$(CDPATH='' cd -- "$venv" && pwd -P):$PATH

# The hosts meet on the first one: by its IPv4 address where it tells one that others can reach.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hosts[0]:?scontrol names no host of this job}
told=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address) || told=''
read -r address _ <<<"$told" || true
[[ $address =~ ^[0-9]+(\.[0-9]+){3}$ && $address != 127.* ]] || address=$head_node
# Another port for another job on the same host: 20000 to 31999, below what the kernel gives to clients.
port=$((20000 + SLURM_JOB_ID % 12000))

# Without it the processes of a restart look for those that died (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes="${SLURM_NNODES:-${#hosts[@]}}" \
  --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$address:$port" \
  "$script" "$@"
