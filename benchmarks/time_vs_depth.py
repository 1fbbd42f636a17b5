"""How long does one training step take, against stored and checkpointed execution of the same
two-stream network?

python benchmarks/time_vs_depth.py --rows eager-2048 eager-1024 --out
benchmarks/results/time_vs_depth_h100.md python benchmarks/time_vs_depth.py --device cpu
"""

from __future__ import annotations

from _race import BLOCK, EAGER, FIXED, FLOAT, STORED, Row, Target, main

GIB = 2**30

ROWS = (
    Row(
        "eager-2048", 2048, 4096, 2, 24, arms=EAGER,
        targets=(
            Target(FLOAT, 1.34, STORED),
            Target(FIXED, 1.04, FLOAT),
            Target(FLOAT, 0.36, BLOCK, "peak"),
        ),
    ),
    Row(
        "eager-1024", 1024, 1024, 8, 24, arms=EAGER,
        targets=(
            Target(FLOAT, 1.36, STORED), Target(FLOAT, 0.6, BLOCK), Target(FIXED, 1.36, STORED)
        ),
    ),
    Row(
        "eager-1024-48", 1024, 1024, 8, 48, arms=EAGER,
        targets=(Target(FLOAT, 1.36, STORED), Target(FLOAT, 0.6, BLOCK)),
    ),
    Row(
        "fullgraph-1024", 1024, 1024, 8, 12, "fullgraph", arms=(STORED, BLOCK, FLOAT, FIXED),
        targets=(Target(FLOAT, 1.34, STORED), Target(FLOAT, 0.9, BLOCK)),
    ),
    Row(
        "fullgraph-2048", 2048, 4096, 2, 12, "fullgraph", arms=(STORED, BLOCK, FLOAT, FIXED),
        targets=(Target(FLOAT, 1.33, STORED), Target(FLOAT, 1.05, BLOCK)),
    ),
    Row("captured-1024", 1024, 1024, 8, 12, "captured", arms=(STORED, BLOCK, FLOAT, FIXED)),
    Row(
        "autocast-1024", 1024, 1024, 8, 24, autocast=True, arms=EAGER,
        targets=(Target(FLOAT, 1.40, STORED), Target(FIXED, 1.40, STORED)),
    ),
    Row(
        "autocast-1024-48", 1024, 1024, 8, 48, autocast=True, arms=EAGER,
        targets=(Target(FLOAT, 1.40, STORED),),
    ),
    Row(
        "autocast-2048", 2048, 4096, 2, 24, autocast=True, arms=EAGER,
        targets=(Target(FIXED, 1.02, FLOAT),), rounds=9,
    ),
    # 1,000 layers: two branches to a block. Stored execution does not fit on the card.
    Row(
        "thousand", 512, 65536, 1, 500, arms=(BLOCK, FLOAT, FIXED), rounds=None, allowed=0.5,
        targets=(Target(FLOAT, 1.03, BLOCK), Target(FLOAT, 1.25 * GIB, "bytes")),
    ),
    Row(
        "cpu-256", 256, 256, 4, 12, device="cpu", arms=EAGER, rounds=9,
        targets=(Target(FLOAT, 1.33, STORED),),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main("Time and memory of a training step", ROWS)
