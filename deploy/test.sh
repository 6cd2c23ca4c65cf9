#!/bin/bash
# Runs every check on this checkout: ./deploy/test.sh [ARGUMENTS FOR PYTEST]
#
# Makes .venv in the checkout when there is none. Debian packages that the tests need are installed when this runs as root
# and named otherwise. The last line is pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/venv.sh
need memcached /usr/bin/memcached             # tokens of Swift's tempauth
need qemu-utils /usr/bin/qemu-img             # real disk images
need prometheus /usr/bin/promtool             # checks metrics and rules
need chromium /usr/bin/chromium               # reads the status page
need wrk /usr/bin/wrk                         # load for the benchmarks
need aria2 /usr/bin/aria2c                    # another client
need git-lfs /usr/bin/git-lfs                 # another client
need qemu-system-x86 /usr/bin/qemu-system-x86_64  # boots from a ticket
need qemu-block-extra "/usr/lib/$(uname -m)-linux-gnu/qemu/block-curl.so"
need patch /usr/bin/patch                     # Nova's code gets its way to tickets
need nginx /usr/sbin/nginx                     # verifying fronts, and the files behind them
need libnginx-mod-http-js /usr/lib/nginx/modules/ngx_http_js_module.so
need haproxy /usr/sbin/haproxy
need postgresql-15 /usr/lib/postgresql/15/bin/postgres
need curl /usr/bin/curl                        # the README and the guides use it
need awscli /usr/bin/aws                      # the guide to S3 stores uses it
need systemd /usr/bin/systemd-analyze         # checks the units
need libseccomp2 "/usr/lib/$(uname -m)-linux-gnu/libseccomp.so.2"  # the units' filters, where systemd does not run
install_packages
make_venv test
# Clients of DRS, and the suite that checks servers, without what they ask for: pins of 2022 and a package that hides Python's own asyncio
# (tests/acceptance/test_drs.py).
if [ ! -d .venv/drs-clients ]; then
    rm -rf .venv/drs-clients.new
    into=(.venv/bin/python -m pip install --quiet --target .venv/drs-clients.new)
    twice "${into[@]}" --no-deps drs-compliance-suite==1.0.3 ga4gh-testbed-lib==0.2.0 drs-cli==0.2.3 drsclient==0.3.2 </dev/null
    twice "${into[@]}" --upgrade "httpx>=0.28" "pydantic>=2" </dev/null
    mv .venv/drs-clients.new .venv/drs-clients
fi

export PATH="$PWD/.venv/bin:$PATH"
# What hundreds of processes import is compiled once: here, while the checks below need one core, or each of pytest's workers would do it.
unset PYTHONDONTWRITEBYTECODE
pytest --collect-only -q "$@" </dev/null >/dev/null 2>&1 & compiled=$!
ruff check --quiet broker deploy schemas tests
ruff format --check --quiet broker deploy schemas tests
mypy --strict broker
lint-imports --no-logo --no-cache
wait "$compiled" || true  # what is wrong is said below
# Tests wait for servers more than they compute: two for each core. Long files come first (acceptance), so that none is left over at the end.
exec pytest -n "$((2 * $(nproc)))" --dist loadfile --no-loadscope-reorder -q "$@" </dev/null
