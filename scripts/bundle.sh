#!/usr/bin/env bash
# bundle.sh FOLDER: collects what a build needs besides a compiler, make and the CUDA Toolkit, for a machine without a
# network: the headers of CLI11, nlohmann/json and zlib, zlib's static library, and GoogleTest's sources. About 3 MB.
# There, `make BUNDLE=FOLDER` builds from it (with the CPU backend's own products in the place of oneDNN's).
set -euo pipefail
folder=${1:?usage: scripts/bundle.sh FOLDER}
read -ra cxx <<<"${CXX:-g++}"

fail() {
  echo "bundle: $*" >&2
  exit 1
}

# The folder that an include like <CLI/CLI.hpp> is found in.
include_root() {
  local path
  path=$(printf '#include <%s>\n' "$1" | "${cxx[@]}" -std=c++20 -E -x c++ - 2>/dev/null |
    sed -n "s|^# [0-9]* \"\(.*\)/$1\".*|\1|p" | head -n 1)
  [ -n "$path" ] || fail "the header $1 is not there; scripts/setup.sh test installs it"
  echo "$path"
}

googletest=
for candidate in /usr/src/googletest/googletest /usr/src/gtest; do
  [ -f "$candidate/src/gtest-all.cc" ] && googletest=$candidate && break
done
[ -n "$googletest" ] || fail "the sources of GoogleTest are not there (Debian: libgtest-dev, googletest)"
zlib=$("${cxx[@]}" -print-file-name=libz.a)
[ -f "$zlib" ] || fail "the static library of zlib is not there (Debian: zlib1g-dev)"

rm -rf "$folder"
mkdir -p "$folder/include" "$folder/lib" "$folder/googletest"
cp -r "$(include_root CLI/CLI.hpp)/CLI" "$(include_root nlohmann/json.hpp)/nlohmann" "$folder/include/"
cp "$(include_root zlib.h)/zlib.h" "$(include_root zconf.h)/zconf.h" "$folder/include/"
cp "$zlib" "$folder/lib/"
cp -r "$googletest/src" "$folder/googletest/"
if [ -d "$googletest/include/gtest" ]; then
  cp -r "$googletest/include/gtest" "$folder/include/"
else
  cp -r "$(include_root gtest/gtest.h)/gtest" "$folder/include/"
fi
echo "bundle: $folder, $(du -sh "$folder" | cut -f1)"
