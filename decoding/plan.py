"""The shape of speculation of each method on one machine, as ``staged plan`` measured it: readable JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from decoding.config import METHODS, SpeculationConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of each method on one machine. ``fastest`` is the method to use where none is asked for."""

    shapes: dict[str, SpeculationConfig]
    fastest: str
    conditions: dict[str, Any]  # models, machine and prompts it was measured with
    speedups: dict[str, float]  # over plain decoding, on those prompts

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Raises ValueError for a file that is no plan."""
        try:
            fields = json.loads(Path(path).read_text())
            shapes = {method: _shape(given) for method, given in fields.pop("shapes").items()}
            plan = cls(shapes=shapes, **fields)
            if {*shapes} - {*METHODS} or plan.fastest not in shapes:
                raise ValueError(f"shapes must be of methods of {METHODS}, one of them the fastest, got {[*shapes]}")
            if not isinstance(plan.conditions, dict):
                raise ValueError(f"conditions must be an object, got {plan.conditions!r}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a plan that 'staged plan' wrote: {error}") from error
        return plan


def _shape(given: dict[str, Any]) -> SpeculationConfig:
    return SpeculationConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )
