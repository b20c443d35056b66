#!/usr/bin/env bash
# setup.sh [--check|--packages] [build|demo|test|bench|fuzz|format]: installs what the project needs and this machine lacks,
# and nothing else.
# With --check it installs nothing: it names what is missing and the command that installs it, and exits 1. With --packages
# it installs what comes from the distribution, and leaves the virtual environment for another call.
#
#   build   compiler and libraries of ./train_gpt2
#   demo    build, the virtual environment .venv with the packages of requirements-demo.txt, and bible-kjv, whose text the
#           demo learns from (where the distribution has it)
#   test    build, GoogleTest, Boost.Context (of tests/cuda_on_cpu), PyTorch (where the distribution has it), and
#           .venv with requirements-test.txt, too
#   bench   build, and Google Benchmark
#   fuzz    build, and Clang with the runtime of libFuzzer and the sanitizers
#   format  clang-format
#
# For Debian 12 and Ubuntu 22.04, or later. Elsewhere it checks, and names what is missing. What a thing is good for is
# tested (a header, a library, a module), not which package it came from, so a run with nothing to do takes a fraction
# of a second and needs no network. CXX and BLAS are those of the Makefile.
set -euo pipefail

check=
packages_only=
case ${1:-} in
  --check) check=yes && shift ;;
  --packages) packages_only=yes && shift ;;
esac
target=${1:-build}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -ra cxx <<<"${CXX:-g++}" # a name, or words like "ccache g++"
blas=${BLAS:-dnnl}
venv=$root/.venv
log=$root/build/setup.log

fail() {
  echo "setup: $*" >&2
  exit 1
}

case $target in
  build | demo | test | bench | fuzz | format) ;;
  *)
    echo "usage: scripts/setup.sh [build|demo|test|bench|fuzz|format]" >&2
    exit 2
    ;;
esac

# The distribution's own Python: another one that comes first in PATH would not see the distribution's PyTorch.
python=/usr/bin/python3
[ -x $python ] || python=$(command -v python3 || echo $python)

# ---- what is missing, as names of Debian packages

required=()  # without these the target cannot be made
optional=()  # it can do without these

# What is missing without an optional package.
without() {
  case $1 in
    bible-kjv) echo "the demo learns from other text" ;;
    python3-torch) echo "tests that compare with PyTorch will be skipped" ;;
  esac
}

has_header() {
  printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$1" | "${cxx[@]}" -std=c++20 -E -x c++ - >/dev/null 2>&1
}

has_library() {
  local file
  for file in "lib$1.so" "lib$1.a"; do
    [ "$("${cxx[@]}" -print-file-name="$file" 2>/dev/null)" != "$file" ] && return 0
  done
  return 1
}

links_fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer,address,undefined -x c++ -o /dev/null - 2>/dev/null
}

# need PACKAGE HEADER LIBRARY
need() { { has_header "$2" && { [ -z "$3" ] || has_library "$3"; }; } || required+=("$1"); }

find_missing() {
  required=() optional=()
  if [ "$target" = format ]; then
    command -v clang-format >/dev/null || required+=(clang-format)
    return
  fi
  if ! command -v "${cxx[0]}" >/dev/null; then
    [ "${cxx[0]}" = g++ ] || fail "the compiler CXX=${cxx[*]} is not there"
    required+=(g++)
  fi
  # Clang's OpenMP is a package of its own, in a folder that only the compiler knows.
  if [[ ${cxx[*]} = *clang* ]] && ! echo 'int main() {}' | "${cxx[@]}" -fopenmp -x c++ -o /dev/null - 2>/dev/null; then
    required+=(libomp-dev)
  fi
  command -v make >/dev/null || required+=(make)
  need libcli11-dev CLI/CLI.hpp ""
  need nlohmann-json3-dev nlohmann/json.hpp ""
  need zlib1g-dev zlib.h z
  case $blas in
    dnnl) need libdnnl-dev dnnl.hpp dnnl ;;
    none) ;; # products of our own
    *) fail "BLAS=$blas: it is dnnl (oneDNN) or none" ;;
  esac
  if [ "$target" = test ]; then
    need libgtest-dev gtest/gtest.h gtest
    need libboost-context-dev boost/context/fiber.hpp boost_context
  fi
  if [ "$target" = bench ]; then
    need libbenchmark-dev benchmark/benchmark.h benchmark
  fi
  if [ "$target" = fuzz ] && ! links_fuzzer; then
    required+=(clang)
    # Some distributions have the runtime in a package of its own.
    ! apt-cache show libclang-rt-dev >/dev/null 2>&1 || required+=(libclang-rt-dev)
  fi
  if [ "$target" = demo ] || [ "$target" = test ]; then
    [ -x "$python" ] || required+=(python3)
    has_module ensurepip || required+=(python3-venv)
  fi
  if [ "$target" = demo ]; then
    command -v bible >/dev/null || optional+=(bible-kjv)
  fi
  if [ "$target" = test ]; then
    has_module numpy || required+=(python3-numpy)
    has_module torch || optional+=(python3-torch)
  fi
}

modules_found=
has_module() {
  if [ -z "$modules_found" ] && [ -x "$python" ]; then
    modules_found=$("$python" -c '
from importlib.util import find_spec
print("found", *(name for name in ("ensurepip", "numpy", "torch") if find_spec(name)))' 2>/dev/null || echo found)
  fi
  [[ " $modules_found " == *" $1 "* ]]
}

# ---- packages of the distribution

apt_options=(-o DPkg::Lock::Timeout=300)
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)

apt_get() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "${apt_options[@]}" "$@" </dev/null >>"$log" 2>&1
}

# One line about why: apt's or pip's last error, else the last line of the log.
last_error() {
  local line no_network='connection (refused|timed out|error)|NameResolution|failure (in name )?resol'
  no_network+='|could not (resolve|connect)|unreachable|from versions: none'
  if grep -qaiE "$no_network" "$log" 2>/dev/null; then
    line="the package server cannot be reached"
  else
    line=$(grep -aE '^(E|ERROR|error)[: ]' "$log" 2>/dev/null | tail -n 1 || true)
  fi
  echo "${line:-$(tail -n 1 "$log" 2>/dev/null || true)} (details in ${log#"$root"/})"
}

updated=
apt_update() {
  [ -z "$updated" ] || return 0
  updated=yes
  "${as_root[@]}" dpkg --configure -a </dev/null >>"$log" 2>&1 || true # ends an installation that was interrupted
  apt_get update || true # an old list of packages may still do
}

install_packages() {
  local names=("${required[@]}" "${optional[@]}")
  local command="apt-get install -y --no-install-recommends ${names[*]}"
  if [ ${#required[@]} -gt 0 ]; then
    command -v apt-get >/dev/null ||
      fail "missing: ${required[*]} (Debian's names); there is no apt-get here, install them by hand"
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
      fail "missing: ${required[*]}; as root, run: $command"
    fi
    echo "setup: installing ${required[*]}"
    apt_update
    apt_get install -y --no-install-recommends "${required[@]}" ||
      fail "could not install ${required[*]} with apt-get: $(last_error)"
  fi
  [ ${#optional[@]} -gt 0 ] || return 0
  # No long wait for what it can do without.
  apt_options+=(-o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10)
  local name
  for name in "${optional[@]}"; do
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }; then
      echo "setup: installing $name"
      apt_update
      apt_get install -y --no-install-recommends "$name" ||
        echo "setup: going on without $name ($(without "$name")): $(last_error)"
    else
      echo "setup: going on without $name ($(without "$name")): it takes apt-get, and root or sudo"
    fi
  done
}

# ---- the virtual environment

# Identifies what .venv should hold; a stamp with this text is written when it does.
wanted() {
  "$python" -c 'import sys; print(sys.version)'
  cat "$root"/scripts/requirements-demo.txt
  [ "$1" = demo ] || cat "$root"/scripts/requirements-test.txt
}

is_installed() { [ -f "$venv/.installed-$1" ] && [ "$(cat "$venv/.installed-$1")" = "$(wanted "$1")" ]; }

install_venv() {
  is_installed "$target" && [ -x "$venv/bin/python" ] && return 0
  # A venv that was left half made (no .created) or with pip at work (.installing) is made anew.
  if [ ! -f "$venv/.created" ] || [ -f "$venv/.installing" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
    [ "$(cat "$venv/.created")" != "$("$python" -c 'import sys; print(sys.version)')" ]; then
    echo "setup: creating .venv"
    rm -rf "$venv"
    "$python" -m venv --system-site-packages "$venv" >>"$log" 2>&1 ||
      fail "could not create .venv with $python: $(last_error)"
    "$python" -c 'import sys; print(sys.version)' >"$venv/.created"
  fi
  local packages
  packages=$(cat "$root"/scripts/requirements-demo.txt)
  [ "$target" = demo ] || packages+=$'\n'$(cat "$root"/scripts/requirements-test.txt)
  packages=$(sed -e '/^[#-]/d' -e 's/[=<>;].*//' <<<"$packages" | uniq | tr '\n' ' ')
  echo "setup: installing ${packages% }"
  touch "$venv/.installing"
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -r \
    "$root/scripts/requirements-$target.txt" </dev/null >>"$log" 2>&1 || {
    rm -f "$venv/.installing" # pip ended by itself: what it installed is whole
    fail "could not install with pip: ${packages% }: $(last_error)"
  }
  rm -f "$venv/.installing"
  wanted demo >"$venv/.installed-demo"
  [ "$target" = demo ] || wanted test >"$venv/.installed-test"
}

# ---- main

# One setup at a time in one checkout; the lock is on this file and ends with the process.
exec 9<"${BASH_SOURCE[0]}"
command -v flock >/dev/null && flock 9

[ "$target" != fuzz ] || [ -n "$check" ] || links_fuzzer || { mkdir -p "$root/build" && apt_update; }
find_missing
if [ -n "$check" ]; then
  [ ${#required[@]} -gt 0 ] || exit 0
  fail "missing: ${required[*]}; install with: ${as_root[*]} apt-get install -y --no-install-recommends ${required[*]}"
fi
# PyTorch is asked for once: where the distribution has none, a finished setup does not try again.
[ "$target" != test ] || [ ! -f "$venv/.installed-test" ] || optional=()
if [ ${#required[@]} -gt 0 ] || [ ${#optional[@]} -gt 0 ] || [ "$target" = demo ] || [ "$target" = test ]; then
  mkdir -p "$root/build"
fi
if [ ${#required[@]} -gt 0 ] || [ ${#optional[@]} -gt 0 ]; then
  : >"$log"
  install_packages
  modules_found=
  find_missing
  [ ${#required[@]} -eq 0 ] || fail "still missing after the installation: ${required[*]}"
fi
case $target$packages_only in
  demo | test) install_venv ;;
esac
