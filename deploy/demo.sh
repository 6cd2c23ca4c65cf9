#!/bin/bash
# Shows the main job on this machine, with real stores: ./deploy/demo.sh [--once] [--keep DIRECTORY] [--port PORT]
#
# Makes .venv in the checkout when there is none. Debian packages that are missing are installed when this runs as root and
# named otherwise; without qemu-utils the demo goes on with a raw image. Ctrl-C ends everything; with --once it ends by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/venv.sh
if [ ${#packages[@]} -gt 0 ]; then  # no venv without python3-venv
    install_packages
    packages=()
fi
need qemu-utils /usr/bin/qemu-img
install_packages || echo "going on without ${packages[*]}"
make_venv demo
exec .venv/bin/python -m deploy.demo "$@"
