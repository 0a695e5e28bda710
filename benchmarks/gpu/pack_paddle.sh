#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs what through_paddle.py needs into parts of less than 60 MB, for a machine with a GPU and no network: a Python, a
# Paddle without its machine code for GPUs, what it imports, and paddle_asgd built for both. Changes nothing but OUT.
#   pack_paddle.sh VENV SOURCE OUT    VENV with paddlepaddle-gpu; SOURCE a copy of this repository with _C.so built by it
#   unpack there: cat OUT/paddle.tar.xz.* | tar -xJ -C DIR && DIR/run --place gpu
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 source=$2 out=$3
python=$venv/bin/python
site=$("$python" -c 'import site; print(site.getsitepackages()[0])')
base=$("$python" -c 'import sys; print(sys.base_prefix)')
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$out" "$tree/site" "$tree/python/bin" "$tree/python/lib"

"$python" "$here/slim_paddle.py" "$site/paddle" "$tree/site/paddle"
find "$tree/site/paddle" -name '*.so*' -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
# What Paddle imports, whole; not what belongs to CUDA, which the other machine has, or has not.
for name in setuptools pkg_resources _distutils_hack packaging numpy numpy.libs google _upb decorator decorator.py astor opt_einsum PIL pillow.libs httpx httpcore h11 anyio sniffio \
  idna certifi typing_extensions.py exceptiongroup networkx sympy mpmath; do
  if [ -e "$site/$name" ]; then cp -r "$site/$name" "$tree/site/"; fi
done
mkdir -p "$tree/paddle_asgd"
cp -r "$source/paddle_asgd" "$source/benchmarks" "$tree/paddle_asgd/"

cp "$base/bin/$version" "$tree/python/bin/"
cp -r "$base/lib/$version" "$tree/python/lib/"
find "$base/lib" -maxdepth 1 -name 'libpython*.so*' -exec cp -a {} "$tree/python/lib/" \;
(cd "$tree/python/lib/$version" && rm -rf test site-packages ensurepip idlelib tkinter lib2to3 config-*)
find "$tree" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$tree" -type d -name tests -path '*/site/*' -prune -exec rm -rf {} +

cat > "$tree/run" <<RUN
#!/bin/sh
# Everything beside this file, and nothing of the machine's own Python.
here=\$(cd "\$(dirname "\$0")" && pwd)
export PYTHONHOME=\$here/python PYTHONPATH=\$here/site PYTHONNOUSERSITE=1 LD_LIBRARY_PATH=\$here/python/lib:\${LD_LIBRARY_PATH:-}
exec "\$here/python/bin/$version" "\$here/paddle_asgd/benchmarks/gpu/through_paddle.py" --path "\$here/site" "\$@"
RUN
chmod +x "$tree/run"
rm -f "$out"/paddle.tar.xz.*
tar -C "$tree" -c . | xz -3 -T0 | split -b 55M -d - "$out/paddle.tar.xz."
ls -l "$out"
