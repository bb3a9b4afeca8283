# Sourced by the other scripts: creates the virtual environment .venv (or $VENV) if it does not
# exist, installs the given requirements files into it, and activates it.
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    python=$(command -v python3 || command -v python) ||
        { echo "error: Python is missing; install 3.11 or newer" >&2; exit 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$python" --version) is too old; install 3.11 or newer" >&2; exit 2; }
    "$python" -m venv "$venv"
fi
source "$venv/bin/activate"

# pip takes seconds even if nothing is missing, so call it only if the files have changed since it
# last succeeded.
wanted=$(cat requirements*.txt | cksum)
for file in "$@"; do
    if [ "$(cat "$venv/installed-$file" 2>/dev/null)" != "$wanted" ]; then
        python -m pip install --quiet --disable-pip-version-check -r "$file"
        echo "$wanted" >"$venv/installed-$file"
    fi
done
