"""Makes the figures: raw rounds in, a Markdown table and a verdict out.

It knows nothing but the JSON of a run, so every figure in a document can be made again from the
file that it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median, quantiles

from benchmarks.harness import Result

SANE, VOID, UNVERIFIED = "sane", "void", "unverified"
COLUMNS = (
    *("variant", "µs, median", "least", "quartiles"),
    *("ratio", "its quartiles", "against", "goal", "switches"),
)


def table(result: Result) -> str:
    """The whole run in Markdown."""
    machine = result["machine"]
    gil = "on" if machine["gil"] else "off"
    pinned = machine["pinned_to"]
    placed = "not pinned" if pinned is None else f"all pinned to CPU {pinned}"
    where = (
        f"{machine['date']}, commit {machine['commit']}: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{placed}, policy {machine['policy']}, load "
        f"{machine['load']:.2f}; Linux {machine['kernel']}; {machine['python']}, GIL {gil}; "
        f"{result['rounds']} rounds."
    )
    lines = [where]
    for name, topic in result["topics"].items():
        lines += ["", f"### {name}: {topic['unit']}", ""]
        if "figures" in topic:
            lines += figures(topic)
            continue
        lines += [*rows(topic), ""]
        if topic.get("ladder"):
            lines += [*layers(topic), ""]
        lines += [f"Left out: {one}: {why}." for one, why in topic["left_out"].items()]
        lines += set_aside(topic)
        lines += [judge(topic)[1]]
    return "\n".join(lines).rstrip()


def set_aside(topic: Result) -> Iterator[str]:
    """What was found when it was void, and measured again because of that."""
    for one in topic["voided"]:
        ratio = ", ".join(
            f"{variant['name']} {median(ratios(one, variant)):.3f}"
            for variant in one["variants"]
            if wanted(variant)
        )
        yield f"Measured again, since it was {judge(one)[1]} It had {ratio or 'no goal'}."


def figures(topic: Result) -> Iterator[str]:
    """What was counted."""
    yield "| what | figure | unit | at most |"
    yield "|---|---|---|---|"
    for figure in topic["figures"]:
        goal = "" if figure["goal"] is None else f"{figure['goal']:g}"
        yield f"| {figure['name']} | {figure['value']:,.1f} | {figure['unit']} | {goal} |"


def rows(topic: Result) -> Iterator[str]:
    """Times are µs for one unit; the ratio is the median of the rounds' ratios."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    for variant in topic["variants"]:
        times = micros(variant)
        switches = median(variant["switches"]) / (variant["runs"] * variant["per"])
        cells = [variant["name"], f"{median(times):.3f}", f"{min(times):.3f}", spread(times)]
        if variant["against"] == variant["name"]:
            cells += ["1", "", ""]
        elif variant["against"] in topic["left_out"]:
            cells += ["", "", variant["against"]]
        else:
            shares = ratios(topic, variant)
            cells += [f"{median(shares):.3f}", spread(shares), variant["against"]]
        yield "| " + " | ".join([*cells, wanted(variant), f"{switches:.2f}"]) + " |"


def wanted(variant: Result) -> str:
    """The goal of its ratio, if it has one."""
    if variant["least"] is not None:
        return f"≥ {variant['least']:.2f}"
    return "" if variant["goal"] is None else f"{variant['goal']:.2f}"


def goals(results: list[Result]) -> str:
    """What was to be reached, what would be better still, and what the worst of these runs has."""
    lines = [
        "| topic | what | goal | beyond | in each run | worst | its quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(name for result in results for name in result["topics"]))
    for name in names:
        topics = [result["topics"][name] for result in results if name in result["topics"]]
        if "figures" in topics[0]:
            for figure in topics[0]["figures"]:
                if figure["goal"] is not None:
                    values = [find(topic, figure["name"], "figures")["value"] for topic in topics]
                    goal = f"{figure['goal']:g} {figure['unit']}"
                    lines.append(
                        goal_row(name, figure, goal, [([value], False) for value in values])
                    )
            continue
        for variant in topics[0]["variants"]:
            if wanted(variant):
                runs = [
                    (ratios(topic, find(topic, variant["name"])), judge(topic)[0] == VOID)
                    for topic in topics
                ]
                lines.append(goal_row(name, variant, wanted(variant), runs))
    return "\n".join(lines)


def goal_row(topic: str, what: Result, goal: str, runs: list[tuple[list[float], bool]]) -> str:
    """Of each run the rounds, or the one figure; and whether it is void."""
    least, beyond = what.get("least"), what["beyond"]
    worst = (max if least is None else min)((rounds for rounds, _ in runs), key=median)
    middle = median(worst)
    verdict = f"{middle:,.3f}"
    missed = middle > what["goal"] if least is None else middle < least
    if missed:
        verdict = f"**{verdict}, not reached**"
    elif beyond is not None and middle <= beyond:
        verdict = f"{verdict}, beyond"
    each = ", ".join(f"{median(rounds):,.3f}{' (void)' * void}" for rounds, void in runs)
    better = "" if beyond is None else f"{beyond:g}"
    quartiles = "" if len(worst) == 1 else spread(worst)
    return f"| {topic} | {what['name']} | {goal} | {better} | {each} | {verdict} | {quartiles} |"


def layers(topic: Result) -> Iterator[str]:
    """What each rung of the ladder takes beyond the one before it, in the median of the rounds; the
    last line is what the whole takes beyond their sum."""
    yield "| layer | µs | of the whole |"
    yield "|---|---|---|"
    rungs = [find(topic, name) for name in topic["ladder"]]
    whole = median(micros(rungs[-1]))
    before = [0.0] * len(rungs[0]["ns"])
    total = 0.0
    for rung in rungs[:-1]:
        times = micros(rung)
        took = median(mine - less for mine, less in zip(times, before, strict=True))
        yield f"| {rung['name']} | {took:.2f} | {took / whole:.1%} |"
        before = times
        total += took
    yield f"| **sum** | **{total:.2f}** | **{total / whole:.1%}** |"
    yield f"| {rungs[-1]['name']} | {whole:.2f} | 100% |"


def judge(topic: Result) -> tuple[str, str]:
    """Whether the run can be believed, and a sentence about it (empty if there is no check)."""
    check = topic.get("check")
    if check is None:
        return SANE, ""
    try:
        ratio = median(ratios(topic, find(topic, check["variant"])))
    except LookupError:
        why = topic["left_out"].get(check["variant"], "it was not run")
        return UNVERIFIED, f"**unverified**: {check['variant']} is missing ({why})."
    against = find(topic, check["variant"])["against"]
    times = micros(find(topic, against))
    unrest = median(times) / quantiles(times, n=10, method="inclusive")[0]
    sane = check["low"] <= ratio <= check["high"] and unrest <= check["steady"]
    verdict = SANE if sane else VOID
    return verdict, (
        f"**{verdict}**: {check['variant']} is {ratio:.3f} of its base, "
        f"{check['low']:.2f}-{check['high']:.2f} expected; {against} took {unrest:.2f} times what "
        f"it took in its best tenth, at most {check['steady']:.2f} expected."
    )


def ratios(topic: Result, variant: Result) -> list[float]:
    """The variant's time over that of its base, in each round."""
    other = find(topic, variant["against"])
    pairs = zip(micros(variant), micros(other), strict=True)
    return [mine / theirs for mine, theirs in pairs]


def find(topic: Result, name: str, among: str = "variants") -> Result:
    for variant in topic[among]:
        if variant["name"] == name:
            found: Result = variant
            return found
    raise LookupError(name)


def micros(variant: Result) -> list[float]:
    return [ns / 1000 / (variant["runs"] * variant["per"]) for ns in variant["ns"]]


def spread(figures: list[float]) -> str:
    lower, _, upper = quantiles(figures, n=4, method="inclusive")
    return f"{lower:.3f}-{upper:.3f}"
