# Source this: it makes .venv with requirements.txt where that is not there or out of date, and activates it.
#
#     source activate_env.sh
#
# PYTHON names another interpreter than python3 (3.10 or newer). A finished environment bears a stamp, the hash of the
# requirements; one without it, or with another, is installed anew.

_activate_env() {
    local here="$1" stamp cpu
    stamp=$("${PYTHON:-python3}" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$here/requirements.txt") || return 1
    if [ "$(cat "$here/.venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "making the environment .venv: a few minutes, once"
        export PIP_DISABLE_PIP_VERSION_CHECK=1
        rm -f "$here/.venv/.stamp"
        "${PYTHON:-python3}" -m venv "$here/.venv" || return 1
        # Without an NVIDIA GPU torch's CPU build does, a tenth of the size, where the package index offers one.
        if ! command -v nvidia-smi >/dev/null 2>&1; then
            for cpu in $("$here/.venv/bin/pip" index versions torch 2>/dev/null | tr ', ' '\n\n' | grep '+cpu$' | sort -ru); do
                "$here/.venv/bin/pip" install --quiet "torch==$cpu" -r "$here/requirements.txt" 2>/dev/null && break
            done
        fi
        "$here/.venv/bin/pip" install --quiet -r "$here/requirements.txt" || return 1
        echo "$stamp" >"$here/.venv/.stamp"
    fi
    . "$here/.venv/bin/activate"
}

_activate_env "$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)"
