"""What changed between a record on the disk and what is asked for now: a refusal has to name it."""

import json


def differences(recorded: dict, wanted: dict) -> list[str]:
    """``"name was 1, now 2"`` for each name, nested ones joined by dots, under which the two differ.

    ``recorded`` has been through JSON; ``wanted`` goes through it here.
    """
    return _differences(recorded, json.loads(json.dumps(wanted)), "")


def _differences(recorded: dict, wanted: dict, prefix: str) -> list[str]:
    found = []
    for key in sorted({*recorded, *wanted}):
        before, now = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {_short(before)}, now {_short(now)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
