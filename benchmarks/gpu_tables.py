"""The GPU kit's ratios and its short tables."""

from __future__ import annotations

from typing import Any

# What makes two rows of a benchmark comparable.
HEAD_CASE = ("dtype", "vocab", "targets", "width")
STEP_CASE = ("pair",)
# Failed tests that are printed; gpu.json has all of them.
MOST_FAILED = 20


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row how its time compares to that of the `floor` of the same case.

    times_products: its time over that of the four matrix products, measured in the same run
    excess_bytes_per_logit: the time beyond them, as the bytes that a copy moves in it, for each
        logit of one model
    times_floor: the time of a step over that of its backbones and the four products
    """
    floors = {_case(row): row["seconds"] for row in rows if _is_floor(row)}
    for row in rows:
        floor = floors.get(_case(row))
        if not floor or "seconds" not in row:
            continue
        if "pair" in row:
            row["times_floor"] = round(row["seconds"] / floor, 3)
            continue
        row["times_products"] = round(row["seconds"] / floor, 3)
        if rate := row.get("copy_gb_s"):
            logits = row["targets"] * row["vocab"]
            bytes_moved = (row["seconds"] - floor) * rate * 1e9
            row["excess_bytes_per_logit"] = round(bytes_moved / logits, 1)
    return rows


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in (STEP_CASE if "pair" in row else HEAD_CASE))


def _is_floor(row: dict[str, Any]) -> bool:
    return row.get("variant") == "floor" and "seconds" in row


def write_tables(result: dict[str, Any]) -> None:
    """Print one line a benchmark row, the tests that failed, and one line a section."""
    sections, dry = result["sections"], result["dry"]
    for row in sections.get("head", {}).get("rows", []):
        case = f"{row['dtype']:<9}V={row['vocab']:<7}N={row['targets']:<6}d={row['width']:<5}"
        print(f"{case}{row['variant']:<12}{_figures(row, 'times_products', dry)}")
    for row in sections.get("step", {}).get("rows", []):
        print(f"{row['pair']:<26}{row['variant']:<12}{_figures(row, 'times_floor', dry)}")
    tests = sections.get("tests", {}).get("rows", [])
    failed = [row for row in tests if row.get("outcome") == "failed"]
    for row in failed[:MOST_FAILED]:
        print(f"failed: {row['test']}: {row['error'].splitlines()[0][:160]}")
    if len(failed) > MOST_FAILED:
        print(f"failed: {len(failed) - MOST_FAILED} more, see gpu.json")
    machine = {k: v for k, v in result["machine"].items() if v and not (dry and "_s" in k)}
    print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    for name, section in sections.items():
        counts = [f"{section['cases']} cases"] if "cases" in section else []
        counts += [f"{section['left_out']} left out"] if section.get("left_out") else []
        error = section.get("error") or section.get("reason") or ""
        parts = [section["status"], f"{section['seconds']:.1f} s", *counts, error[:300]]
        print(f"{name:<9}{', '.join(filter(None, parts))}")
    if dry:
        print("a dry run on a CPU with tiny sizes: the times in gpu.json are no figures")


def _figures(row: dict[str, Any], ratio: str, dry: bool) -> str:
    if "seconds" not in row:
        return row.get("error", "no result")[:120]
    if dry:
        return "ran"
    low, high = row["seconds_range"]
    text = f"{1e3 * row['seconds']:9.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f})"
    text += f"{row.get(ratio, float('nan')):7.2f} x"
    if row.get("extra_mb") is not None:
        text += f"{row['extra_mb']:9.0f} MB extra"
    if row.get("peak_mb") is not None:
        text += f"{row['peak_mb']:9.0f} MB peak"
    return text if row.get("agrees", True) else f"{text}  disagrees with eager PyTorch"
