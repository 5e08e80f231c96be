#!/usr/bin/env bash
# Make the virtual environment of this checkout, or complete it.
#
#   bash tools/setup_env.sh               .venv: upstream OpenMMLab (default)
#   STACK=onedl bash tools/setup_env.sh   .venv-onedl: the OneDL forks
#   STACK=newest bash tools/setup_env.sh  .venv-newest: upstream, versions
#                                         floating
#   FLOAT=1 STACK=onedl ...               .venv-onedl-float: any stack,
#                                         versions floating
#   PYTHON=python3.12 ...                 the interpreter (default python3)
#
# Otherwise the versions are those of requirements/constraints-*.txt, which
# the tests have passed with. Scripts source this file: it puts the
# environment on PATH. When nothing has changed it returns at once.

setup_env() {
    local root stack float constraints mm python venv stamp ours busy log
    # The folder itself, by whatever links it is reached.
    root=$(CDPATH= cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stack=${STACK:-upstream}
    float=${FLOAT:-0}
    case $stack in
        upstream) venv=$root/.venv mm=mminstall.txt ;;
        onedl) venv=$root/.venv-onedl mm=mminstall-onedl.txt ;;
        newest) venv=$root/.venv-newest mm=mminstall.txt ;;
        *) setup_env_die "STACK=$stack is none of upstream, onedl, newest" ;;
    esac
    constraints=$root/requirements/constraints-$stack.txt
    if [ "$stack" = newest ]; then
        constraints=
    elif [ "$float" = 1 ]; then
        constraints= venv=$root/.venv-$stack-float
    fi
    python=${PYTHON:-python3}
    stamp=$venv/.mmseg_textkd-stamp
    ours=$venv/.mmseg_textkd-made-here
    busy=$venv/.mmseg_textkd-busy
    log=$venv/setup.log

    # One set-up at a time; the lock is gone with this subshell.
    (
        if command -v flock > /dev/null; then
            exec 9> "$venv.lock"
            flock 9
        fi
        setup_env_install
    ) || exit 1
    # shellcheck source=/dev/null
    . "$venv/bin/activate"
    hash -r
}

setup_env_die() {
    echo "setup_env: $*" >&2
    exit 1
}

setup_env_say() {
    echo "setup_env: $*"
}

setup_env_hash() {
    # What the content of the environment follows from.
    (cd "$root" && cat requirements.txt requirements/*.txt setup.py \
        pyproject.toml tools/setup_env.sh mmseg_textkd/version.py
        echo "$root $stack $float"
        "$venv/bin/python" -c 'import sys; print(sys.version)') |
        sha256sum | cut -d' ' -f1
}

setup_env_install() {
    local version want sum
    if [ -f "$stamp" ] && [ ! -f "$busy" ] && [ -x "$venv/bin/python" ] &&
        sum=$(setup_env_hash 2> /dev/null) &&
        [ "$sum" = "$(cat "$stamp")" ]; then
        setup_env_say "$venv is complete (stack $stack)"
        return
    fi

    command -v "$python" > /dev/null || setup_env_die \
        "no $python found; on Debian or Ubuntu: apt install python3" \
        "python3-venv python3-pip (or set PYTHON=...)"
    version=$("$python" -c \
        'import sys; print("%d.%d" % sys.version_info[:2])') ||
        setup_env_die "$python does not run"
    case $version in
        2.* | 3.[0-9]) setup_env_die \
            "$python is Python $version, but 3.10 to 3.13 is needed (set" \
            "PYTHON=...)" ;;
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *) setup_env_say "Python $version has not been tested, going on" ;;
    esac
    "$python" -c 'import venv, ensurepip' 2> /dev/null || setup_env_die \
        "$python has no venv module; on Debian or Ubuntu: apt install" \
        "python3-venv"

    # What we made and did not finish, or made elsewhere, is made anew.
    if [ -f "$ours" ] &&
        { [ -f "$busy" ] || [ "$(cat "$ours")" != "$root" ] ||
            ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; }; then
        setup_env_say "$venv is unfinished or was moved, making it anew"
        rm -rf "$venv"
    fi
    if [ ! -x "$venv/bin/python" ]; then
        setup_env_say "making $venv with Python $version"
        mkdir -p "$venv"
        echo "$root" > "$ours"
        touch "$busy"
        "$python" -m venv "$venv" > "$log" 2>&1 ||
            setup_env_die "python -m venv failed: $(tail -1 "$log")"
    fi
    touch "$busy"
    rm -f "$stamp"

    setup_env_say "installing the $stack stack into $venv: with torch about" \
        "6 GB, 2 to 5 minutes (log: $log)"
    # torch and torchvision must come from one command: only a pair of
    # builds that belong together works.
    setup_env_pip install -r "$root/requirements.txt" \
        -r "$root/requirements/$mm" ${constraints:+-c "$constraints"}
    setup_env_pip install --no-deps --no-build-isolation -e "$root"
    setup_env_cv2
    rm -f "$busy"
    setup_env_say "checking that everything imports"
    want='torch, torchvision, open_clip, mmseg_textkd, mmseg.apis'
    (cd "$venv" && "$venv/bin/python" -W ignore -c "import $want") \
        >> "$log" 2>&1 ||
        setup_env_die "what was installed does not import: $(tail -1 "$log")"
    setup_env_hash > "$stamp.new"
    mv "$stamp.new" "$stamp"
    setup_env_say "$venv is complete (stack $stack)"
}

setup_env_pip() {
    local out=$venv/pip.log
    if "$venv/bin/python" -m pip --disable-pip-version-check "$@" \
        > "$out" 2>&1; then
        cat "$out" >> "$log"
        return
    fi
    cat "$out" >> "$log"
    # pip gives up in good order: no reason to make the environment anew.
    rm -f "$busy"
    # Offline, pip may speak of conflicts; ask for something that is anywhere.
    "$venv/bin/python" -m pip download -q --no-deps -d "$venv/probe" wheel \
        > /dev/null 2>&1 || setup_env_die \
        "the package registry cannot be reached; check the network, or name" \
        "a mirror by PIP_INDEX_URL=... (log: $log)"
    rm -rf "$venv/probe"
    grep -iE '^ *error' "$out" | tail -3 >&2
    setup_env_die "pip $1 failed, see $log"
}

setup_env_cv2() {
    # opencv-python needs libGL and libxcb of a desktop, which a bare server
    # has not. Nothing here opens a window, so headless does as well.
    local error release
    error=$("$venv/bin/python" -c 'import cv2' 2>&1) && return
    setup_env_say "cv2 does not load (${error##*$'\n'})," \
        "taking opencv-python-headless instead"
    release=$("$venv/bin/python" -c 'from importlib.metadata import version
print(version("opencv-python"))' 2> /dev/null)
    setup_env_pip uninstall -y opencv-python opencv-python-headless
    setup_env_pip install --no-deps \
        "opencv-python-headless${release:+==$release}"
    error=$("$venv/bin/python" -c 'import cv2' 2>&1) || setup_env_die \
        "cv2 does not load: ${error##*$'\n'}; on Debian or Ubuntu: apt" \
        "install libgl1 libglib2.0-0"
}

# setup_overlay NAME PIP_ARGUMENT...: what pip installs goes into .venv-NAME,
# which looks into .venv for all else, so that .venv stays as its constraints
# say. Sets `overlay` to its path; fails where pip does.
setup_overlay() {
    local name=$1 site want stamp word
    shift
    overlay=$PWD/.venv-$name
    stamp=$overlay/.mmseg_textkd-stamp
    site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    want="$site $(for word; do
        [ ! -f "$word" ] || cat "$word"
    done | sha256sum)"
    [ "$(cat "$stamp" 2> /dev/null)" != "$want" ] || return 0
    setup_env_say "installing $* into $overlay"
    rm -rf "$overlay"
    python -m venv "$overlay"
    # Behind its own packages come those of .venv.
    echo "$site" > "$("$overlay/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/stack.pth"
    timeout 900 "$overlay/bin/python" -m pip --disable-pip-version-check \
        install "$@" > "$overlay/setup.log" 2>&1 || {
        setup_env_say "pip failed, see $overlay/setup.log"
        return 1
    }
    echo "$want" > "$stamp"
}

setup_env
