#!/bin/bash
# Check and measure one machine, without a network; one GPU takes at most ten minutes:
#   bash benchmarks/gpu/run.sh [FOLDER]
# FOLDER gets campaign.json and campaign.md; by default it is gpu_results. On a machine without a GPU
# every step runs at a small size, and takes as long as it needs: CPUs differ more than GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
FOLDER=${1:-gpu_results}
export PYTHONPATH="$PWD:$PWD/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
mkdir -p "$FOLDER"
LIMIT=()
if "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  LIMIT=(--limit 100)
fi
# A failed check must not keep the numbers of the others from us.
"$PYTHON" -m kdrl_lightning doctor "${LIMIT[@]}" --json "$FOLDER/doctor.json" || true
"$PYTHON" benchmarks/gpu/campaign.py "$FOLDER"
