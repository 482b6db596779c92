#!/bin/sh
# install.sh PYTHON VENV WHAT NAME HOW_LONG: `pip install -e WHAT` into VENV, which is made when it is missing or broken.
# Says in one line that it is under way. All that pip wrote stays in VENV/install.log; its warnings are shown, except
# "Location ... is ignored", which some pip configurations print once for every package.
set -eu
base=$1 venv=$2 what=$3 name=$4 how_long=$5
log=$venv/install.log

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "vitexp needs Python 3.11 or newer, and '$base' is not: make PYTHON=/path/to/python3.11 ..." >&2
        exit 1
    fi
    "$base" -m venv --clear "$venv"
fi

echo "installing $name into $venv: $how_long (details: $log)"
status=0
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-color -e "$what" >"$log" 2>&1 || status=$?
noise='is ignored: it is neither a file nor a directory'
if [ "$status" -eq 0 ]; then
    grep -E '^ *(WARNING|DEPRECATION)' "$log" | grep -v "$noise" >&2 || true
else
    echo "pip failed; the end of $log:" >&2
    grep -v "$noise" "$log" | tail -n 25 >&2
    if grep -q 'No space left on device' "$log"; then
        free=$(df -Pk "$venv" | awk 'NR == 2 {printf "%.1f", $4 / 1048576}')
        echo "the disk is full: all that vitexp needs takes about 7 GB in $venv, and $free GB are free there" >&2
    fi
fi
exit "$status"
