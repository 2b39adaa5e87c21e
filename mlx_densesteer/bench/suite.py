"""All benchmarks one after the other, and what they found as one object and one table."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from ..errors import InputError
from . import batch, decode, extract, generation, resteer, speculative, startup, sweep
from .report import REFUSALS, Row, reason
from .subject import Subject
from .timing import Tell, quiet

BENCHMARKS = MappingProxyType({
    "decode": decode, "generation": generation, "startup": startup, "batch": batch,
    "resteer": resteer, "speculative": speculative, "extract": extract, "sweep": sweep,
})  # fmt: skip

Finding = tuple[str, dict[str, object]]


def chosen(names: Sequence[str]) -> list[str]:
    """Return the benchmarks of these names, all without any, in the suite's order.

    Raises:
        InputError: there is no such benchmark.
    """
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise InputError(
            f"no benchmark {', '.join(unknown)}: expected some of {', '.join(BENCHMARKS)}."
        )
    return [name for name in BENCHMARKS if not names or name in names]


def measure(
    subject: Subject,
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    options: Mapping[str, Mapping[str, object]] | None = None,
    tell: Callable[[str], Tell] = lambda name: quiet,
) -> Iterator[Finding]:
    """Yield (name, result) of each benchmark as it is done.

    One that cannot run gives ``{"details": {"reason": ...}}``. ``options`` by name go before those
    of the suite; ``tell(name)`` returns who is told how far that benchmark is.
    """
    for name in chosen(names):
        module = BENCHMARKS[name]
        settings = {**(module.QUICK if quick else module.SUITE), **(options or {}).get(name, {})}
        began = time.perf_counter()
        try:
            result = module.run(subject, tell=tell(name), **settings)
        except REFUSALS as error:
            result = {"details": {"reason": reason(error)}}
        result["details"]["wall_seconds"] = round(time.perf_counter() - began, 1)
        yield name, result


def document(found: Mapping[str, dict], head: Mapping[str, object], missing: str) -> dict:
    """Return one object: figures at the top level, ``header``, ``details`` by benchmark.

    A figure without a measurement is ``None``; ``missing`` is the reason where a benchmark did
    not run at all.
    """
    figures: dict[str, object] = {}
    details: dict[str, object] = {}
    for name, module in BENCHMARKS.items():
        result = found.get(name, {"details": {"reason": missing}})
        figures |= {key: result.get(key) for key in module.FIGURES}
        details[name] = result["details"]
    return {**figures, "header": dict(head), "details": details}


def table(found: Mapping[str, dict]) -> list[tuple[str, Row]]:
    """Return the rows of all benchmarks with their names."""
    return [(name, row) for name, result in found.items() for row in _rows(name, result)]


def _rows(name: str, result: dict) -> list[Row]:
    if "reason" in result["details"]:
        return [Row("not measured", "-", remark=str(result["details"]["reason"]))]
    return BENCHMARKS[name].rows(result)
