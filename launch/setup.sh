# Sourced by demo.sh and tests/run.sh: makes .venv beside the README and installs requirements.txt into it, and what
# $more_requirements names.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "alexnet: $python is no Python 3.10 or newer; name one: PYTHON=/path/to/python3 bash $0" >&2
    exit 2
fi
for requirements in requirements.txt ${more_requirements:-}; do
    installed=.venv/installed-${requirements//\//-}
    if ! cmp -s "$requirements" "$installed"; then
        echo "Installing $requirements into $PWD/.venv ..." >&2
        [ -d .venv ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --requirement "$requirements"
        [ "$requirements" != requirements.txt ] || .venv/bin/python -m pip install --quiet --no-deps --editable .
        cp "$requirements" "$installed"
    fi
done
