#!/bin/sh
# Install OpenBLAS where that is possible without asking; otherwise say in one line what to type.
[ "$(uname -s)" = Linux ] || exit 0
for library in /usr/lib/*/libopenblas.so.0 /usr/lib*/libopenblas.so.0 /usr/local/lib/libopenblas.so.0; do
  [ -e "$library" ] && exit 0
done
install="apt-get install -y -q libopenblas0-pthread"
if command -v apt-get >/dev/null; then
  if [ "$(id -u)" = 0 ]; then as=""; elif sudo -n true 2>/dev/null; then as="sudo -n"; else as=no; fi
  if [ "$as" != no ]; then
    ($as apt-get update -q && $as env DEBIAN_FRONTEND=noninteractive $install) >/dev/null 2>&1 && exit 0
  fi
fi
echo "hint: OpenBLAS is missing and MLX will be about 50 times slower; type: sudo $install" >&2
