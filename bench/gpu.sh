#!/usr/bin/env bash
# What a GPU should show, in one process and without a network: bench/gpu.py, whose flags these are.
#
#     bash bench/gpu.sh                            # about 4 minutes on an H100, 450 s at most
#     bash bench/gpu.sh --device cpu --small       # the same in small, to try it out
#
# PYTHON says which Python. It stops itself in time; should it hang, it is stopped from outside, and
# what it has printed by then stays.
cd "$(dirname "$0")/.." || exit
timeout -k 5 480 "${PYTHON:-python3}" -u bench/gpu.py "$@"
code=$?
[[ $code == 0 ]] || echo "FAILED (exit code $code; 124 is out of time)"
exit $code
