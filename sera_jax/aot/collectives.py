"""Which collectives a compiled program holds: by kind, how often, and bytes of the results on a device.

Read from its HLO text. One within a loop counts once a trip where the loop says how many trips it makes; where it does
not (a decoder stops by what it decodes), it counts once and stands apart. Between slices of TPUs the compiler leaves
collectives to the hosts, so that they stand in the text as what a device sends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_BETWEEN_SLICES = re.compile(r' = \((\w+\[[\d,]*\]).* send\(.*_xla_megascale_transfer_type="(\w+)"')
_ROOT = re.compile(r"ROOT \S+ = (.*?) [\w\-]+\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=(%?[\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_COUNTER = re.compile(r" get-tuple-element\(.*index=(\d+)")
_CARRIED = re.compile(r" tuple\(([^)]*)\)")
_NAME = re.compile(r"%[\w.\-]+")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_BOUND = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}


class Collective(NamedTuple):
    """One kind, `all-reduce between slices` being another than `all-reduce`. `each_step`: of a loop that does not say
    how many trips it makes."""

    kind: str
    times: int
    bytes: int
    each_step: bool = False


def collectives(hlo: str) -> list[Collective]:
    """Of a compiled program's text, the largest first."""
    entry, bodies = _computations(hlo)
    found: dict[tuple[str, str], tuple[int, int, bool]] = {}
    for trips, endless, line, place in _walk(bodies, entry, 1, False):
        if said := _COLLECTIVE.search(line):
            shape, kind, start = said.groups()
        elif said := _BETWEEN_SLICES.search(line):
            shape, kind, start = said[1], f"{said[2].lower().replace('_', '-')} between slices", None
        else:
            continue
        computation = place.partition(":")[0]
        if computation.startswith("all-reduce-scatter"):  # fused with the taking of a part
            kind, shape = "reduce-scatter", next(filter(None, map(_ROOT.search, bodies[computation])))[1]
        sizes = [_size(*array) for array in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)]
        if start and kind == "all-gather":  # gives the operands, then the results
            sizes = sizes[len(sizes) // 2 :]
        size = max(sizes, default=0) if start and kind == "collective-permute" else sum(sizes)
        channel = re.search(r"channel_id=(\d+)", line)
        # the parts of an asynchronous one, and a loop's copies, carry one channel
        key = (kind, channel[1]) if channel else (kind, place)
        if key not in found or trips > found[key][0]:
            found[key] = (trips, size, endless)
    total: dict[tuple[str, bool], tuple[int, int]] = {}
    for (kind, _), (trips, size, endless) in found.items():
        count, all_ = total.get((kind, endless), (0, 0))
        total[kind, endless] = (count + trips, all_ + trips * size)
    out = [Collective(kind, count, size, endless) for (kind, endless), (count, size) in total.items()]
    return sorted(out, key=lambda one: -one.bytes)


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of every computation by name."""
    entry, bodies, name = "", {}, ""
    for line in hlo.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            bodies[name].append(line)
    return entry, bodies


def _walk(bodies: dict[str, list[str]], name: str, trips: int, endless: bool) -> Iterator[tuple[int, bool, str, str]]:
    """(how often it runs, whether each step of an endless loop, the line, a name of its place) of all that `name`
    calls."""
    for number, line in enumerate(bodies.get(name, ())):
        yield trips, endless, line, f"{name}:{number}"
        within, without_end = trips, endless
        if " while(" in line:
            known = _trips(bodies, line)
            within, without_end = (trips, True) if known is None else (trips * known, endless)
        for one, several in _CALLED.findall(line):
            for other in re.findall(r"[\w.\-]+", one or several):
                yield from _walk(bodies, other, within, without_end)


def _trips(bodies: dict[str, list[str]], line: str) -> int | None:
    """How many trips a loop makes: as the compiler notes them or, where it keeps no notes (TPUs), the bound of a
    condition that is nothing but one on a counter from 0, over what its body adds to that: 1 in a scan, 2 in a matmul
    that waits for its weights piece by piece, from either side."""
    if noted := _TRIPS.search(line):
        return int(noted[1])
    condition, body = (bodies.get(named[1], []) if (named := part.search(line)) else [] for part in (_CONDITION, _BODY))
    bounds = [found[1] for text in condition if (found := _BOUND.search(text))]
    counts = [text for text in condition if "ROOT" in text and " compare(" in text and "direction=LT" in text]
    counters = [found[1] for text in condition if (found := _COUNTER.search(text))]
    if len(bounds) != 1 or len(counts) != 1 or len(counters) != 1:
        return None
    return -(-int(bounds[0]) // _added(body, int(counters[0])))


def _added(body: list[str], place: int) -> int:
    """What a loop's body adds to that element of what it carries; 1 where it does not say so in plain words."""
    named = dict(text.strip().split(" = ", 1) for text in body if " = " in text)
    root = _CARRIED.search(next((words for name, words in named.items() if name.startswith("ROOT")), ""))
    carried = root[1].split(", ") if root else []
    sum_ = named.get(carried[place].split("*/")[-1], "") if place < len(carried) else ""
    terms = _NAME.findall(sum_.partition(" add(")[2].partition(")")[0])
    steps = [found[1] for name in terms if (found := _CONSTANT.search(named.get(name, "")))]
    return int(steps[0]) if steps else 1


def _size(kind: str, dims: str) -> int:
    return _BYTES.get(kind, 0) * math.prod(int(size) for size in dims.split(",") if size)
