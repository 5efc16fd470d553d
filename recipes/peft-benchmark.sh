#!/bin/sh
# Plans as experiments of PEFT's own benchmark; 9,175,040 parameters are those of its lora/llama-3.2-3B-rank32.
#   sh recipes/peft-benchmark.sh PEFT/method_comparison/MetaMathQA
# Then run them as PEFT's README says, and print the results: weightlora paper peft RESULT.json ...
set -eu
here=$(dirname "$0")
while read -r name options; do
    # shellcheck disable=SC2086
    weightlora select --config "$here/peft-benchmark.yaml" $options --output_dir "runs/peft-benchmark/$name"
    weightlora emit "runs/peft-benchmark/$name/plan.json" --for peft-benchmark \
        --output_dir "$1/experiments/lora/llama-3.2-3B-weightlora-$name"
done <<ROWS
all-linear --parameters 9175040
random --method random --parameters 9175040
default
time --time 0.6 --parameters 9175040 --rule first_order
upper-half --rule benchmarks.choice.rules.heuristic:LastLayers --adapters 0.5 --lora_r 12 --lora_alpha 24
ROWS
