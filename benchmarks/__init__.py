"""Paired benchmarks against HF PEFT, every measurement in a process of its own.

python -m benchmarks                  # all; rewrites benchmarks/results.json and docs/benchmarks.md
python -m benchmarks lora-bf16        # one pair
python -m benchmarks --list
"""
