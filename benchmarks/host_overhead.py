"""What does the engine cost where kernels are small, eager and as a CUDA graph?

python benchmarks/host_overhead.py --out benchmarks/results/host_overhead_h100.md
python benchmarks/host_overhead.py --device cpu
"""

from __future__ import annotations

from _race import BLOCK, FIXED, FLOAT, STORED, Row, Target, main

ROWS = (
    Row(
        "small-eager", 256, 256, 8, 48,
        targets=(Target(FLOAT, 2.0, STORED), Target(FIXED, 2.0, STORED)),
    ),
    Row(
        "small-captured", 256, 256, 8, 48, "captured",
        targets=(
            Target(FLOAT, 1.22, STORED),
            Target(FLOAT, 1 / 12, "small-eager/float"),
            Target(FIXED, 1.22, STORED),
        ),
    ),
    Row("small-autocast", 256, 256, 8, 48, autocast=True),
    Row(
        "cpu-64", 64, 64, 4, 24, device="cpu",
        targets=(Target(FLOAT, 1.42, STORED), Target(FLOAT, 0.9, BLOCK)),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main("Host overhead of the engine", ROWS)
