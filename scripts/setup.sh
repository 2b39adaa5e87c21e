# Sourced by the scripts beside it: makes .venv, installs, loads OpenBLAS on Linux.
# Sets $python. Arguments: the extras to install (dev; chat,serve). POSIX sh; safe to run again.
# shellcheck shell=sh

CDPATH='' cd -- "$(dirname "$0")/.." || exit 1
extra=$1

say() { printf '%s\n' "$*" >&2; }

venv=${DENSESTEER_VENV:-.venv}
python=$venv/bin/python

if [ ! -x "$python" ]; then
    base=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.14 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        say "No Python 3.11 or newer with venv found. Install one (macOS: python.org or brew install"
        say "python; Debian: apt-get install python3 python3-venv) or name it: PYTHON=/path/to/it $0"
        exit 1
    fi
    say "Making $venv with $base ..."
    if ! "$base" -m venv "$venv" >&2; then
        rm -rf "$venv"
        say "$base cannot make virtual environments. On Debian: apt-get install python3-venv"
        exit 1
    fi
fi

# Install when the project file or the extra changed since the last time.
stamp=$venv/.densesteer-$extra
wanted=$(cksum <pyproject.toml)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "Installing mlx-densesteer[$extra] into $venv ..."
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]" >&2 || exit 1
    elif command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$python" -e ".[$extra]" >&2 || exit 1
    else
        say "$venv has no pip. Remove it and run $0 again."
        exit 1
    fi
    printf '%s\n' "$wanted" >"$stamp"
fi

if [ "$(uname -s)" = Linux ]; then
    # The CPU wheel of mlx bundles a reference BLAS: float32 is 20-40 times slower with it.
    blas=$(ls /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0 /usr/lib64/libopenblas.so.0 \
        /usr/lib/libopenblas.so.0 2>/dev/null | head -n 1)
    if [ -n "$blas" ]; then
        LD_PRELOAD=$blas${LD_PRELOAD:+:$LD_PRELOAD}
        export LD_PRELOAD
        # OpenBLAS takes a processor that is newer than itself for a Prescott of 2004: 3-6 times slower.
        if [ -z "${OPENBLAS_CORETYPE:-}" ] && OPENBLAS_VERBOSE=2 env true 2>&1 | grep -q Prescott; then
            case " $(grep -m 1 '^flags' /proc/cpuinfo) " in
                *' avx512vl '*) export OPENBLAS_CORETYPE=SkylakeX ;;
                *' avx2 '*) export OPENBLAS_CORETYPE=Haswell ;;
            esac
        fi
    else
        say "OpenBLAS not found: float32 will be slow. Debian: apt-get install libopenblas0-pthread"
    fi
    command -v g++ >/dev/null 2>&1 ||
        say "No C++ compiler found: mlx compiles kernels with g++ on Linux. Debian: apt-get install g++"
fi
