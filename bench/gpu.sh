#!/usr/bin/env bash
# Everything that a GPU should show, in under 9 minutes and without a network:
#
#     bash bench/gpu.sh                            # parity, bench/speed.py, the paper's shape
#     bash bench/gpu.sh --device cpu --small       # the same in small, to try it out
#
# A part that fails or that runs out of its time is named, and the others go on. PYTHON says which
# Python, and the arguments go to all parts.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} failed=0 speed=(--rounds 3 --device cuda --dtype bf16 --only ours)
[[ " $* " == *" --small "* ]] &&
  speed=(--device cuda --rounds 1 --prompts 2 --samples 2 --tokens 8 --only "step, ours, arca")
[[ " $* " == *" --device cpu "* ]] && speed+=(--device cpu)

part() {  # the seconds it may take, and the command
  printf '\n## %s\n\n' "${*:4}"
  timeout "$1" "${@:2}"
  local code=$?
  [[ $code == 0 ]] || { echo "FAILED (exit code $code, 124 is out of time): ${*:4}"; failed=1; }
}

part 80 "$python" -u bench/gpu.py parity "$@"
part 180 "$python" -u bench/speed.py "${speed[@]}"
part 250 "$python" -u bench/gpu.py paper "$@"
exit $failed
