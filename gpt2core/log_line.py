"""The one format of log.txt: `step=250 loss=3.2118 lr=0.00035 of=95365 eta=2d03h`, words of name=value that grep and awk split."""

from __future__ import annotations

import re

STEP = re.compile(r"(?:^| )step=(\d+) (.*)")
ENDED_BY = "WARNING: training ended: "  # what log.txt has before the error that a trainer gave up with
AS_TEXT = {"max_steps": "of", "eta_s": "eta"}  # shorter names than in metrics.jsonl


def step_line(step: int, values: dict[str, float]) -> str:
    """What log.txt says of a measurement; `max_steps` and `eta_s` show as `of` and `eta`."""
    words = [f"{AS_TEXT.get(name, name)}={_text(name, value)}" for name, value in values.items()]
    return " ".join([f"step={step}", *words])


def parse(line: str) -> dict[str, str]:
    """The words of a line that step_line made, with `step` among them; none of any other line."""
    if not (match := STEP.search(line)):
        return {}
    pairs = [word.partition("=") for word in match[2].split()]
    if not pairs or not all(mark for _, mark, _ in pairs):
        return {}
    return {"step": match[1]} | {name: value for name, _, value in pairs}


def short_duration(seconds: float) -> str:
    """Two units are enough: 45s, 12m05s, 3h20m, 2d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if not hours:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{days}d{hours % 24:02d}h" if days else f"{hours}h{minutes % 60:02d}m"


def seconds_of(text: str) -> float:
    """The seconds that short_duration wrote."""
    units = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", text)))


def _text(name: str, value: float) -> str:
    if name == "eta_s":
        return short_duration(value)
    if name == "max_steps":
        return str(value)
    return f"{value:.5g}" if abs(value) < 1000 else f"{value:.0f}"
