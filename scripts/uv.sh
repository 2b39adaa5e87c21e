# Sourced by the scripts beside it: sets $uv, the first argument or what is found.
# shellcheck shell=sh
uv=${1:-$(command -v uv || echo .venv/bin/uv)}
if ! "$uv" --version >/dev/null 2>&1; then
    echo "$0: no uv found. Run scripts/test once, or install uv, or name it: $0 /path/to/uv" >&2
    exit 1
fi
