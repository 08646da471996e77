#!/bin/sh
# Install a browser for the tests of the report where that is possible without asking; otherwise say in one line what to type.
[ "$(uname -s)" = Linux ] || exit 0
for browser in chromium google-chrome chrome chromium-browser; do
  command -v "$browser" >/dev/null && exit 0
done
install="apt-get install -y -q chromium"
if command -v apt-get >/dev/null; then
  if [ "$(id -u)" = 0 ]; then as=""; elif sudo -n true 2>/dev/null; then as="sudo -n"; else as=no; fi
  if [ "$as" != no ]; then
    ($as apt-get update -q && $as env DEBIAN_FRONTEND=noninteractive $install) >/dev/null 2>&1 && exit 0
  fi
fi
echo "hint: no browser, so the tests of the report in a browser are skipped; type: sudo $install" >&2
