#!/bin/sh
# Install OpenBLAS where it is missing.
[ "$(uname -s)" = Linux ] || exit 0
for library in /usr/lib/*/libopenblas.so.0 /usr/lib*/libopenblas.so.0 /usr/local/lib/libopenblas.so.0; do
  [ -e "$library" ] && exit 0
done
exec sh "$(dirname "$0")/install.sh" libopenblas0-pthread "OpenBLAS is missing and MLX will be about 50 times slower"
