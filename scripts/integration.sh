#!/bin/sh
# Does unionfs work on this host? As root on any Linux: scripts/integration.sh [--quick] [--results DIR]; --help has the rest.
#
# Installs the system packages that are missing (apt or dnf; not with --offline), then hands over to tests/host, which builds and
# installs the wheel and does the checking, with a Python of the system: $PYTHON, or the first one that is new enough.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The system's own one first: others may lie where an ordinary user can't enter.
find_python() {
    for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "integration.sh: no Python 3.11 or newer here; name one: PYTHON=... scripts/integration.sh" >&2
    exit 2
}

# Whether one of the arguments says that nothing is to be installed.
offline() {
    for word in "$@"; do
        case $word in --offline | --list | --help | -h) return 0 ;; esac
    done
    return 1
}

if ! offline "$@" && [ "$(id -u)" = 0 ]; then
    PYTHON=${PYTHON:-/usr/bin/python3} "$root/scripts/packages" integration
fi
python=$(find_python)
PYTHONPATH=$root exec "$python" -P -B -m tests.host "$@"
