#!/usr/bin/env bash
# Installs Debian's package of GoogleTest if that is allowed; otherwise CMake fetches its source.
set -euo pipefail
if [ -e /usr/include/gtest/gtest.h ] || ! command -v apt-get >/dev/null; then
  exit 0
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || exit 0
  sudo="sudo -n"
fi
$sudo apt-get update -qq && $sudo apt-get install -y -qq libgtest-dev >/dev/null ||
  echo "libgtest-dev could not be installed; CMake will fetch GoogleTest's source instead" >&2
