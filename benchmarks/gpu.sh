#!/usr/bin/env bash
# Tests and benchmarks on one NVIDIA card, in at most 8 minutes and without a network.
#
#   make gpu-kit                        once, where there is a network
#   bash benchmarks/gpu.sh              on the GPU machine, with the folder .gpu-kit beside it
#   bash benchmarks/gpu.sh --dry        the same on a CPU with tiny sizes
#
# gpu.json and gpu.log are written to --out, to $OUT, or to the current folder.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
