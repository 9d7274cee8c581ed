#!/bin/sh
# Make a virtual environment and install a requirements file in it, unless that is done already.
#   sh tools/make_venv.sh PYTHON VENV REQUIREMENTS
# An empty PYTHON chooses the first supported version that this machine has.
set -eu
wanted=$1 venv=$2 requirements=$3
# In order of preference. The README's numbers are 3.12's; 3.11 has only JAX 0.10; 3.14 has no TensorFlow yet.
supported="3.12 3.13 3.11 3.14"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_supported() { case " $supported " in *" $1 "*) ;; *) return 1 ;; esac; }

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
  version=$(version_of "$python")
  is_supported "$version" || { echo "$python is Python $version; supported: $supported" >&2; exit 1; }
else
  version=
  for name in $(printf 'python%s ' $supported) python3 python; do
    if python=$(resolve "$name"); then version=$(version_of "$python"); fi
    if is_supported "$version"; then break; fi
  done
  is_supported "$version" ||
    { echo "no supported Python found ($supported); set PYTHON=/path/to/python3.12" >&2; exit 1; }
fi

# An environment of another version is made again.
if [ -x "$venv/bin/python" ]; then
  present=$(version_of "$venv/bin/python" || echo none)
  if [ "$present" != "$version" ]; then rm -rf "$venv"; fi
fi
# Without pip it is a half-made one: Debian's Python, for one, stops there if the package python3-venv is missing.
[ -x "$venv/bin/python" ] && [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"

stamp="$venv/.installed-$requirements"
sum=$(cat requirements*.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum" ]; then
  echo "installing $requirements into $venv (Python $version)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  # Without --no-compile pip compiles every file, 48 s; Python compiles what is imported, and keeps it.
  "$venv/bin/python" -m pip install --quiet --no-compile -r "$requirements"
  echo "$sum" > "$stamp"
fi
