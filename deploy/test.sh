#!/bin/bash
# Runs every check on this checkout: ./deploy/test.sh [ARGUMENTS FOR PYTEST]
#
# Makes .venv in the checkout when there is none. Debian packages that the tests need are installed when this runs as root
# and named otherwise. The last line is pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive

# A Debian package and a file that it brings.
packages=()
need() { [ -e "$2" ] || packages+=("$1"); }
need memcached /usr/bin/memcached             # tokens of Swift's tempauth
need qemu-utils /usr/bin/qemu-img             # real disk images
need prometheus /usr/bin/promtool             # checks metrics and rules
need wrk /usr/bin/wrk                         # load for the benchmarks
need aria2 /usr/bin/aria2c                    # another client
need postgresql-15 /usr/lib/postgresql/15/bin/postgres

# Debian's interpreter first: it is built with profiles and runs faster than most others.
python=
for candidate in /usr/bin/python3 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "Python 3.11 or newer is needed: apt-get install python3" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)

twice() { "$@" || { sleep 3; "$@"; }; }

if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "Some programs are missing; install them with: sudo apt-get install ${packages[*]}" >&2
        exit 1
    fi
    echo "installing ${packages[*]}"
    twice apt-get update -qq </dev/null >/dev/null
    twice apt-get install -qq -y --no-install-recommends "${packages[@]}" </dev/null >/dev/null
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
# Installing is skipped while the same setup.cfg is installed already.
stamp=.venv/installed-$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    twice .venv/bin/python -m pip install --quiet -e '.[test]' </dev/null
    rm -f .venv/installed-*
    touch "$stamp"
fi

export PATH="$PWD/.venv/bin:$PATH"
ruff check --quiet broker schemas tests
ruff format --check --quiet broker schemas tests
mypy --strict broker
lint-imports --no-logo --no-cache
exec pytest -n auto --dist loadfile -q "$@" </dev/null
