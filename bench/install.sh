#!/usr/bin/env bash
# Installs the Debian packages that the measures need: bench/install.sh [all]
# Where that cannot be done, says what is missing. Without h2load, taskset and a C compiler
# nothing can be measured; without nginx only nginx is left out.
set -euo pipefail

packages=()
want() { # COMMAND_OR_FILE PACKAGE
  command -v "$1" >/dev/null 2>&1 || [ -e "$1" ] || packages+=("$2")
}
want h2load nghttp2-client
want taskset util-linux
want cc gcc
[ -e /usr/include/stdio.h ] || packages+=(libc6-dev)
want nginx nginx
want /usr/lib/nginx/modules/ngx_http_lua_module.so libnginx-mod-http-lua
if [ "${1:-}" = all ]; then
  want node nodejs
  want npm npm
fi
((${#packages[@]})) || exit 0

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
if command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null 2>&1; }; then
  "${as_root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends \
    "${packages[@]}"
else
  echo "Missing, and apt-get is not at hand to install it; these are the names in Debian:" >&2
  printf '  %s\n' "${packages[@]}" >&2
  for tool in h2load taskset cc; do
    command -v "$tool" >/dev/null 2>&1 || { echo "Without $tool nothing can be measured." >&2; exit 1; }
  done
fi
