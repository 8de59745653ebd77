"""The report on a student made from its teacher, before training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class StudentReport:
    """The parts that were removed from a teacher, and the perplexities before training."""

    parameters: int
    teacher_parameters: int
    removed_layers: dict[str, list[int]]
    """By stack of layers, the teacher's indices."""
    influence: dict[str, list[float]] = field(default_factory=dict)
    """By stack of layers, the block influence of each of the teacher's layers."""
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By field of the config that changed, the width of teacher and student."""
    kept_units: dict[str, list[int]] = field(default_factory=dict)
    """By projection, its neurons or groups of heads that were kept; under "hidden" the features."""
    teacher_perplexity: float | None = None
    """On the rows that were given, over all labels; None without rows or for another head."""
    initial_perplexity: float | None = None
    """That of the student, on the same rows."""

    def to_json(self) -> str:
        """The fields as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def render(self) -> str:
        """The report in a few lines."""
        share = self.parameters / self.teacher_parameters
        lines = [
            f"student: {self.parameters:,} parameters, {share:.1%} of the teacher's "
            f"{self.teacher_parameters:,}"
        ]
        for name, removed in self.removed_layers.items():
            if removed:
                lines.append(f"removed layers of {name}: {', '.join(map(str, removed))}")
        for name, (before, after) in self.widths.items():
            lines.append(f"{name}: {after:,} instead of {before:,}, the most active ones")
        for name, scores in self.influence.items():
            listed = ", ".join(f"{layer}: {score:.3f}" for layer, score in enumerate(scores))
            lines.append(f"block influence in {name}: {listed}")
        if self.initial_perplexity is not None:
            lines.append(
                f"perplexity before training: {self.initial_perplexity:,.1f} (teacher "
                f"{self.teacher_perplexity:,.1f}), on the rows that were measured"
            )
        return "\n".join(lines)
