# Sourced by the other scripts: make the virtual environment .venv (or $VENV) if it is not there, install into it the
# requirements file given, and activate it.
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    python=$(command -v python3 || command -v python) || { echo "error: no Python; install 3.11 or newer" >&2; exit 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$python" --version) is too old; install Python 3.11 or newer" >&2; exit 2; }
    "$python" -m venv "$venv"
fi
source "$venv/bin/activate"
# Asking pip takes seconds even if nothing is missing: ask again only where the files changed since it last succeeded.
wanted=$(cat requirements*.txt | cksum)
if [ "$(cat "$venv/installed-$1" 2>/dev/null)" != "$wanted" ]; then
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    echo "$wanted" >"$venv/installed-$1"
fi
