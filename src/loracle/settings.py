"""How a setting is declared: default, help, unit, limits and place in ``--help``. ``config.py`` declares them all."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from loracle.errors import UserError


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    unit: str | None = None,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    **shown: Any,
) -> Any:
    """A config field with the metadata that the command line and the checks read.

    Args:
        choices: the allowed values of an enumeration.
        unit: what the value counts, or the kind of name it is. ``--help`` shows it behind the flag.
        above, minimum, below: limits of a number: more than, at least, less than.
        shown: how ``--help`` shows it: ``group``, the heading (by default ``GROUP`` of the class); ``common``, whether the
            short help has it (by default ``COMMON`` of the class); ``path``, whether shells complete it as a file.
    """
    metadata = {"help": help, "choices": choices, "unit": unit, "above": above, "minimum": minimum, "below": below}
    return dataclasses.field(
        default=default, metadata={"group": None, "common": None, "path": False} | metadata | shown
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Base of the configs: checks each value against the metadata of its field.

    Raises:
        UserError: a value that the field does not allow, with the flag.
    """

    GROUP: ClassVar = "Options"  # heading in ``--help``
    COMMON: ClassVar = True  # whether the short help has the settings

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, allowed, flag = getattr(self, f.name), f.metadata, "--" + f.name.replace("_", "-")
            if value is None or not allowed:
                continue
            if allowed["choices"] and value not in allowed["choices"]:
                raise UserError(f"{flag} cannot be {value!r}.", f"Choose one of {', '.join(allowed['choices'])}.")
            if isinstance(value, str):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag} must be a finite number, not {value}.")
            if allowed["above"] is not None and value <= allowed["above"]:
                raise UserError(f"{flag} must be above {allowed['above']:g}, not {value}.")
            if allowed["minimum"] is not None and value < allowed["minimum"]:
                raise UserError(f"{flag} must be {allowed['minimum']:g} or more, not {value}.")
            if allowed["below"] is not None and value >= allowed["below"]:
                raise UserError(f"{flag} must be below {allowed['below']:g}, not {value}.")
