#!/usr/bin/env bash
# nvcc.sh OBJECT NVCC ARGUMENTS...: compiles with nvcc, keeps what ptxas says about registers and shared memory beside
# the object (OBJECT.ptxas), shows every other message, and names the kernels that spill registers to memory.
set -uo pipefail
object=$1
shift
log=$object.ptxas
"$@" -Xptxas -v -o "$object" >"$log" 2>&1
code=$?
grep -v -E '^ptxas info|^ *[0-9]+ bytes stack frame|^$' "$log" >&2
[ $code = 0 ] || exit $code
awk '/Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; arch = part[4] }
     /bytes spill stores/ && $5 + 0 > 0 { print arch, $5, kernel }' "$log" | c++filt | sort -u |
  sed 's/^\([^ ]*\) \([0-9]*\) /warning: spills \2 bytes (\1): /' >&2
