#!/bin/bash
# Check and measure one machine in at most ten minutes, without a network:
#   bash benchmarks/gpu/run.sh [FOLDER]
# FOLDER gets campaign.json and campaign.md; by default it is gpu_results. On a machine without a GPU
# every step runs at a small size.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
FOLDER=${1:-gpu_results}
export PYTHONPATH="$PWD:$PWD/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
mkdir -p "$FOLDER"
# A failed check must not keep the numbers of the others from us.
"$PYTHON" -m kdrl_lightning doctor --limit 100 --json "$FOLDER/doctor.json" || true
"$PYTHON" benchmarks/gpu/campaign.py "$FOLDER"
