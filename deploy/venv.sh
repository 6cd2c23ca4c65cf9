# Sourced by the scripts beside it, in the checkout's top directory: Debian packages and .venv.
#
# need PACKAGE FILE      names a Debian package and a file that it brings
# install_packages       installs what is missing, as root; else says how, and fails
# make_venv EXTRA        makes .venv with this checkout and the extra in it; nothing is done while the same is installed already

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive

packages=()
need() { [ -e "$2" ] || packages+=("$1"); }

twice() { "$@" || { sleep 3; "$@"; }; }

install_packages() {
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "Some programs are missing; install them with: sudo apt-get install ${packages[*]}" >&2
        return 1
    fi
    echo "installing ${packages[*]}"
    twice apt-get update -qq </dev/null >/dev/null &&
        twice apt-get install -qq -y --no-install-recommends "${packages[@]}" </dev/null >/dev/null
}

# Debian's interpreter first: it is built with profiles and runs faster than most others.
python=
for candidate in /usr/bin/python3 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "Python 3.11 or newer is needed: apt-get install python3" >&2; exit 1; }
[ -x .venv/bin/pip ] || "$python" -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)

make_venv() {
    local hash
    hash=$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)
    # What the tests need includes what the demo needs.
    if [ -e ".venv/installed-test-$hash" ] || [ -e ".venv/installed-$1-$hash" ]; then
        return 0
    fi
    [ -x .venv/bin/pip ] || "$python" -m venv .venv || return 1
    twice .venv/bin/python -m pip install --quiet -e ".[$1]" </dev/null || return 1
    rm -f .venv/installed-*
    touch ".venv/installed-$1-$hash"
}
