#!/bin/sh
# Makes a virtual environment and installs a requirements file in it, unless that was done already.
#   sh tools/make_venv.sh PYTHON VENV REQUIREMENTS
# An empty PYTHON stands for the newest supported one that this machine has.
set -eu
wanted=$1 venv=$2 requirements=$3
supported="3.12 3.11"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# A pyenv shim exists for every installed version, but runs only the selected one: ask pyenv for the real path.
resolve() {
  if version_of "$1" >/dev/null; then command -v "$1"; return; fi
  command -v pyenv >/dev/null || return 1
  installed=$(pyenv versions --bare | grep "^${1#python}\\." | tail -n 1)
  [ -n "$installed" ] && prefix=$(pyenv prefix "$installed") || return 1
  version_of "$prefix/bin/python" >/dev/null && echo "$prefix/bin/python"
}

if [ -n "$wanted" ]; then
  python=$(resolve "$wanted") || { echo "PYTHON=$wanted does not run on this machine" >&2; exit 1; }
else
  python=
  for name in $(printf 'python%s ' $supported) python3; do
    if python=$(resolve "$name"); then break; fi
  done
  [ -n "$python" ] || { echo "no supported Python found ($supported); set PYTHON=/path/to/python3.12" >&2; exit 1; }
fi
version=$(version_of "$python")
case " $supported " in
  *" $version "*) ;;
  *) echo "$python is Python $version; supported: $supported" >&2; exit 1 ;;
esac

# An environment of another version is made anew.
if [ -x "$venv/bin/python" ]; then
  present=$(version_of "$venv/bin/python" || echo none)
  if [ "$present" != "$version" ]; then rm -rf "$venv"; fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

stamp="$venv/.installed-$requirements"
sum=$(cat requirements*.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum" ]; then
  echo "installing $requirements into $venv (Python $version)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  "$venv/bin/python" -m pip install --quiet -r "$requirements"
  echo "$sum" > "$stamp"
fi
