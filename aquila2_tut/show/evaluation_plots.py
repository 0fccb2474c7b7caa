"""Figures of the evaluation chapters: dots with their intervals, as a share of right answers is no single number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from .plots import BLUE, GREEN, INK, MUTED, ORANGE, PINK, label, new_figure, new_panels, show, styled

Interval = tuple[float, float, float]  # value, low, high: shares from 0 to 1
VARIANTS = {
    "guess": ("a guess", "乱猜"),
    "chat": ("Nano-Chat", "Nano-Chat"),
    "think": ("asked to think", "要求推理"),
    "sft": ("+ SFT", "+ SFT"),
    "cot": ("+ SFT + CoT", "+ SFT + 思维链"),
}
TASKS = {
    "babi15": ("deduction", "演绎"),
    "babi16": ("induction", "归纳"),
    "kinship": ("kinship", "亲属关系"),
    "mean": ("mean", "平均"),
}
WAYS = {"generation": ("written answers", "看写出的答案"), "likelihood": ("likeliest answers", "看似然最大的答案")}
TESTS = {"leaked": ("the test that got out", "泄露的测试题"), "fresh": ("a fresh test", "新出的测试题")}
TRAINED = {"clean": ("trained without it", "训练时没见过"), "leak": ("trained with it", "训练时混入")}
COLOURS = (BLUE, ORANGE, GREEN, PINK)
MARKERS = "osD^"


def _dot(axes: Axes, place: float, found: Interval, colour: str, marker: str = "o", name: str | None = None) -> None:
    """A value with its interval, in percent."""
    value, low, high = (100 * x for x in found)
    axes.plot([low, high], [place] * 2, color=colour, linewidth=2, alpha=0.55)
    axes.plot(value, place, marker, color=colour, markersize=6.5, label=name)


def _percent(axes: Axes, low: float = 0, high: float = 100) -> None:
    axes.set_xlim(low, high)
    axes.grid(visible=False, axis="y")
    axes.title.set_fontsize("medium")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _spelled(found: Interval) -> str:
    value, low, high = found
    return label(f"{value:.0%} ({low:.0%} to {high:.0%})", f"{value:.0%}（{low:.0%} 至 {high:.0%}）")


@styled
def plot_reasoning(scores: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> None:
    """Show what each model has right, task by task, by the two ways of asking.

    Args:
        scores: way ("generation", "likelihood") -> task, and "mean" at last -> variant ("guess", "chat",
            "think", "sft", "cot") -> the share of right answers, low, high.
    """
    tasks = next(iter(scores.values()))
    variants = list(next(iter(tasks.values())))
    figure, panels = new_panels(len(tasks), 1.6 + 0.5 * len(variants), share_y=True)
    for axes, task in zip(panels, tasks, strict=True):
        for number, (way, table) in enumerate(scores.items()):
            for place, variant in enumerate(variants):
                shift, name = 0.28 * (number - (len(scores) - 1) / 2), None if place else label(*WAYS[way])
                _dot(axes, place + shift, table[task][variant], COLOURS[number], MARKERS[number], name)
        axes.set_title(label(*TASKS[task]))
        _percent(axes)
        axes.set_xticks((0, 40, 80))
    _rows(panels[0], [label(*VARIANTS[variant]) for variant in variants])
    figure.supxlabel(label("right answers, %", "答对的比例（%）"), fontsize="medium")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    show(figure, _reasoning_in_words(scores), label("Tuned on answers, and on chains of thought", "学答案与学思维链"))


def _reasoning_in_words(scores: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> str:
    """The last column, which is the mean, way by way."""
    said = []
    for way, table in scores.items():
        task, found = list(table.items())[-1]
        models = label(", ", "，").join(f"{label(*VARIANTS[name])} {_spelled(one)}" for name, one in found.items())
        said.append(label(f"{WAYS[way][0]}, {TASKS[task][0]}: ", f"{WAYS[way][1]}，{TASKS[task][1]}：") + models)
    return label("; ", "；").join(said)


@styled
def plot_leak(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Show what a leak does: the share of right answers to the test that got out and to a fresh one, a dot a seed.

    Args:
        scores: variant ("clean", "leak") -> test ("leaked", "fresh") -> a share for each seed.
    """
    figure, axes = new_figure(height=1.1 + 0.45 * len(scores) * 2)
    names = []
    for test, colour in zip(TESTS, (ORANGE, BLUE), strict=True):
        for variant, tests in scores.items():
            values, place = [100 * share for share in tests[test]], len(names)
            axes.plot([sum(values) / len(values)] * 2, [place - 0.25, place + 0.25], color=INK, linewidth=2)
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=6.5, alpha=0.8)
            names.append(label(f"{TESTS[test][0]}, {TRAINED[variant][0]}", f"{TESTS[test][1]}，{TRAINED[variant][1]}"))
    _rows(axes, names)
    _percent(axes, -2, 102)
    axes.set_xlabel(
        label("right answers, % (a dot a seed, a line at their mean)", "答对的比例（%），每点一个种子，竖线为平均")
    )
    means = [sum(tests[test]) / len(tests[test]) for test in TESTS for tests in scores.values()]
    words = (
        f"{name}: {mean:.0%}" if label("en", "zh") == "en" else f"{name}：{mean:.0%}"
        for name, mean in zip(names, means, strict=True)
    )
    show(figure, label("; ", "；").join(words), label("What a leak does to a score", "泄题对分数的影响"))


@styled
def plot_skills(skills: Mapping[str, Mapping[str, Interval]]) -> None:
    """Show several models skill by skill, each share with the interval that its number of items leaves open.

    Args:
        skills: skill -> model -> share, low, high; the same models, at most four, for each skill.
    """
    models = list(next(iter(skills.values())))
    figure, axes = new_figure(height=1.2 + 0.24 * len(skills) * len(models))
    for place, found in enumerate(skills.values()):
        for number, model in enumerate(models):
            shift = 0.22 * (number - (len(models) - 1) / 2)
            _dot(axes, place + shift, found[model], COLOURS[number], MARKERS[number], None if place else model)
    _rows(axes, list(skills))
    _percent(axes)
    axes.set_xlabel(label("right answers, %", "答对的比例（%）"))
    figure.legend(loc="outside upper center", ncols=min(3, len(models)))
    said = (
        label(f"{skill}: ", f"{skill}：")
        + label(", ", "，").join(f"{model} {_spelled(one)}" for model, one in found.items())
        for skill, found in skills.items()
    )
    show(figure, label("; ", "；").join(said), label("Skill by skill, with intervals", "逐项能力与置信区间"))


@styled
def plot_sizes(points: Mapping[str, tuple[float, float]], task: str, ours: str = "Aquila") -> None:
    """Show how a score goes with the size of a model.

    Args:
        points: model -> parameters in billions, score in percent.
        task: what the score is of, in the language of the page.
        ours: models whose name has this in it are in another colour.
    """
    figure, axes = new_figure(height=3.6)
    for name, (size, value) in points.items():
        own = ours in name
        axes.plot(size, value, "o" if own else "s", color=ORANGE if own else BLUE, markersize=6.5)
        axes.annotate(
            name, (size, value), (6, 4), textcoords="offset points", fontsize=8.5, color=INK if own else MUTED
        )
    sizes = [size for size, _ in points.values()]
    axes.set(xscale="log", xlim=(0.7 * min(sizes), 1.9 * max(sizes)))
    axes.set(xlabel=label("billions of parameters, logarithmic", "参数量（B，即十亿；对数坐标）"), ylabel=f"{task} (%)")
    ticks = [size for size in (1, 2, 5, 10, 20, 50, 100, 200) if min(sizes) / 2 < size < 2 * max(sizes)]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    said = (
        label(f"{name}, {size:g} billion: {value:.1f}", f"{name}，{size:g}B：{value:.1f}")
        for name, (size, value) in points.items()
    )
    show(figure, f"{task}: " + label("; ", "；").join(said), label("Size and score", "规模与得分"))
