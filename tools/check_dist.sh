#!/usr/bin/env bash
# Builds the wheel and the source distribution from a copy of the tree, checks their contents, installs each into an
# environment without ace_ext, and runs the command line from another folder on a tiny model.
#
#   make dist       or: PYTHON=python3 tools/check_dist.sh [folder, default build/dist]
#     PYTHON      has torch and the build requirements of pyproject.toml, default python3; `build` is installed there
#     ACE_CUDA    default 0: an extension for the CPU
#
# The environment is kept in the folder for the next call; remove it to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
base=$(command -v "${PYTHON:-python3}")
base=$(cd "$(dirname "$base")" && pwd)/$(basename "$base")
work=$(mkdir -p "${1:-build/dist}" && cd "${1:-build/dist}" && pwd)
venv=$work/venv
export ACE_CUDA=${ACE_CUDA:-0}

# A copy of the files that git would commit: a build folder in the tree may hold modules that were moved.
rm -rf "$work/source" "$work/out" && mkdir "$work/source" "$work/out"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then cp --parents "$file" "$work/source"; fi
done
"$base" -m pip install --quiet build
(cd "$work/source" && "$base" -m build --no-isolation --sdist --wheel --outdir "$work/out" . >"$work/build.log" 2>&1) ||
  { tail -n 30 "$work/build.log" >&2; exit 1; }

"$base" - "$work" <<'CHECK'
import sys
import tarfile
import zipfile
from pathlib import Path

work = Path(sys.argv[1])
(wheel,), (sdist,) = (work / "out").glob("*.whl"), (work / "out").glob("*.tar.gz")
# --sdist leaves ace_ext.egg-info in the copy.
tree = {str(p.relative_to(work / "source")) for p in (work / "source").rglob("*") if p.is_file()}
tree = {name for name in tree if ".egg-info/" not in name and not name.startswith(("build/", "dist/"))}
with zipfile.ZipFile(wheel) as archive:
    inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    licenses = [name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE")]
package = {name for name in tree if name.startswith("ace_ext/")}  # templates and stubs too
compiled = {name for name in inside if name.startswith("ace_ext/_C.") and name.endswith(".so")}
assert "ace_ext/py.typed" in package
assert licenses, "the wheel has no LICENSE"
assert len(compiled) == 1, compiled
assert inside == package | compiled, sorted(inside ^ (package | compiled))
with tarfile.open(sdist) as archive:
    inside = {name.partition("/")[2] for name in archive.getnames()}
left_out = {name for name in tree if name.startswith(".github/") or name == ".gitignore"}
assert tree - left_out <= inside, sorted(tree - left_out - inside)
print(f"check_dist: {wheel.name}: {len(package)} files of ace_ext; {sdist.name}: {len(tree - left_out)} files")
CHECK

# That of another Python is made anew.
[ "$("$venv/bin/python" -V 2>&1 || true)" = "$("$base" -V)" ] || "$base" -m venv --clear "$venv"
rm -rf "$work/elsewhere" && mkdir "$work/elsewhere"

try() {  # prune a tiny model, verify it, and import every module
  cd "$work/elsewhere"
  rm -rf pruned
  unset PYTHONPATH
  "$venv/bin/ace-prune" --version
  if [ ! -d dense ]; then
    PYTHONPATH=$root/python_tests "$venv/bin/python" - <<'MODEL'
from pathlib import Path

import transformers
from tiny_models import make_model, make_tokenizer

transformers.logging.disable_progress_bar()
make_model("llama").save_pretrained("dense")
make_tokenizer().save_pretrained("dense")
Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
MODEL
  fi
  "$venv/bin/ace-prune" run --model dense --output pruned --calibration text.txt --nsamples 4 --seqlen 16 --device cpu |
    tail -n 2
  "$venv/bin/ace-prune" verify pruned
  "$venv/bin/python" - "$venv" <<'IMPORTS'
import importlib
import pkgutil
import sys

import ace_ext

assert ace_ext.__file__.startswith(sys.argv[1]), ace_ext.__file__
names = [module.name for module in pkgutil.walk_packages(ace_ext.__path__, "ace_ext.") if "__main__" not in module.name]
for name in names:
    importlib.import_module(name)
print(f"check_dist: {len(names)} modules import")
IMPORTS
  cd "$root"
}

# pip resolves the wheel's dependencies by itself.
"$venv/bin/pip" uninstall --quiet --yes ace_ext 2>/dev/null
"$venv/bin/pip" install --quiet "$work"/out/*.whl
echo "check_dist: the wheel"
try

"$venv/bin/pip" uninstall --quiet --yes ace_ext
"$venv/bin/pip" install --quiet 'setuptools>=77' wheel ninja numpy
PATH=$venv/bin:$PATH "$venv/bin/pip" install --quiet --no-build-isolation "$work"/out/*.tar.gz
echo "check_dist: the source distribution"
try
echo "check_dist: both install and run"
