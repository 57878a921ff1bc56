#!/usr/bin/env bash
# Installs Debian's Chromium if there is no browser for the tests of pages, and that is allowed.
set -euo pipefail
for program in chromium chromium-browser google-chrome; do
  if command -v "$program" >/dev/null; then exit 0; fi
done
sudo=""
if [ "$(id -u)" != 0 ]; then sudo="sudo -n"; fi
if command -v apt-get >/dev/null && $sudo apt-get update -qq && $sudo apt-get install -y -qq chromium >/dev/null; then
  exit 0
fi
echo "check-pages: no Chromium found, and it could not be installed; install it (Debian: apt-get install chromium)" >&2
exit 1
