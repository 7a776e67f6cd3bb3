"""How far apart two engines' answers are.

bf16 runs of two different kernels differ in the last bits, so greedy tokens may part at a near-tie.
How much is normal is measured, not assumed: two ways of stock vLLM in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Distance:
    """How two runs of the same prompts differ.

    Attributes:
        num_identical: Prompts with the same tokens throughout.
        worst: Largest difference of a best token's log-probability before the first divergence.
        gaps: The first run's two best log-probabilities apart, where the tokens part.
    """

    num_identical: int
    worst: float
    gaps: list[float]

    @classmethod
    def of(cls, one: dict[str, Any], two: dict[str, Any]) -> Distance:
        """Of two answers of `gpu_engine.generate`."""
        identical, worst, gaps = 0, 0.0, []
        for mine, theirs, my_top, their_top in zip(
            one["tokens"], two["tokens"], one["logprobs"], two["logprobs"], strict=True
        ):
            same = next(
                (i for i, pair in enumerate(zip(mine, theirs, strict=True)) if len(set(pair)) > 1),
                len(mine),
            )
            identical += same == len(mine)
            for i in range(same):
                token = str(mine[i])
                worst = max(worst, abs(my_top[i][token] - their_top[i][token]))
            if same < len(mine):
                best = sorted(my_top[same].values(), reverse=True)
                gaps.append(best[0] - best[1])
        return cls(identical, worst, gaps)

    def check(self, noise: Distance) -> None:
        """No further apart than two ways of stock vLLM are, and only at near-ties."""
        print(f"{self}, stock: {noise}")
        allowed = 2 * max(noise.worst, 0.02)
        assert self.worst <= allowed
        assert all(gap <= 2 * allowed for gap in self.gaps)
