"""What Detent set out to reach, each with the figures that decide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.peers.tables import Result

Find = Callable[[Result], bool]


def accuracy_aims(results: Sequence[Result]) -> list[str]:
    """For one accuracy input: AWQ and GPTQ against the best of their name, `best` against AutoRound."""
    lines = []
    for scheme in ("W4", "W3"):
        here = [r for r in results if r.scheme == scheme]
        for name in ("awq", "gptq"):
            ours, theirs = family(here, name)
            if ours and theirs:
                lines.append(no_higher(f"{scheme} {name.upper()}", ours, theirs))
    for scheme in ("W4", "W3", "W2"):
        here = [r for r in results if r.scheme == scheme]
        ours = best(r for r in here if r.tool == "Detent" and r.method == "best")
        theirs = best(r for r in here if r.tool == "AutoRound" and r.method == "200 iterations")
        if ours and theirs:
            fifth = f"{ours.cpu / theirs.cpu:.2f} of its processor time (aim: 0.20)"
            reached = ours.perplexity <= theirs.perplexity and ours.cpu <= theirs.cpu / 5  # type: ignore[operator]
            lines.append(verdict(reached, f"{scheme} best: {pair(ours, theirs)}, in {fifth}"))
    here = [r for r in results if r.scheme == "W4A4" and r.tool == "Detent"]
    turned = best(r for r in here if "rotation" in r.method)
    plain = best(r for r in here if "rotation" not in r.method)
    if turned and plain:
        lines.append(verdict(turned.perplexity < plain.perplexity, f"W4A4 rotation: {pair(turned, plain)}"))  # type: ignore[operator]
    return lines


def speed_aims(results: Sequence[Result]) -> list[str]:
    """For the speed input."""
    lines = []
    for tool, method, times in (("ModelOpt", "awq_lite", 10), ("llm-compressor", "gptq", 3)):
        theirs = first(results, lambda r, t=tool, m=method: r.tool == t and r.method == m)  # type: ignore[misc]
        ours = first(results, lambda r, m=method: r.tool == "Detent" and r.method == m)  # type: ignore[misc]
        if ours and theirs:
            ratio, cpu = theirs.wall / ours.wall, theirs.cpu / ours.cpu
            text = f"{method}: {ours.wall:.1f} s, {tool} {theirs.wall:.1f} s: {ratio:.1f} times as fast (aim: {times}"
            text += f"; by processor time {cpu:.1f})"
            lines.append(verdict(ratio >= times, text))
    smooth = first(results, lambda r: r.tool == "Detent" and r.method == "smoothquant")
    if smooth and (forward := smooth.seconds.get("forward")):
        text = f"smoothquant W8A8: {smooth.wall:.1f} s, {smooth.wall / forward:.2f} forward passes (aim: 1.20)"
        lines.append(verdict(smooth.wall <= 1.2 * forward, text))
    return lines


def family(results: Iterable[Result], name: str) -> tuple[Result | None, Result | None]:
    named = [r for r in results if name in r.method]
    return best(r for r in named if r.tool == "Detent"), best(r for r in named if r.tool != "Detent")


def best(results: Iterable[Result]) -> Result | None:
    return min((r for r in results if r.perplexity is not None), key=lambda r: r.perplexity, default=None)  # type: ignore[arg-type, return-value]


def first(results: Iterable[Result], find: Find) -> Result | None:
    return next((r for r in results if not r.error and find(r)), None)


def no_higher(what: str, ours: Result, theirs: Result) -> str:
    return verdict(ours.perplexity <= theirs.perplexity, f"{what}: {pair(ours, theirs)}")  # type: ignore[operator]


def pair(ours: Result, theirs: Result) -> str:
    return f"Detent {ours.method} {ours.perplexity:.3f}, {theirs.tool} {theirs.method} {theirs.perplexity:.3f}"


def verdict(reached: bool, text: str) -> str:
    return f"- {'reached' if reached else '**not reached**'}: {text}"
