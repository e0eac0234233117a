"""Durations and lists in words, for log lines and messages."""


def duration(seconds: float) -> str:
    """Write seconds as a person would say them: "89 s", "2 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def listed(names: list[str], most: int = 8) -> str:
    """Join names with commas; of many, show the first few and count the rest."""
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
