#!/usr/bin/env bash
# Run the tests in an environment made for them:  bash tests/run.sh [options of pytest]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
more_requirements=tests/requirements.txt
source "$root/launch/setup.sh"
exec .venv/bin/python -m pytest "$@"
