"""The report's sections, in the order they are read: first what came out, last what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkd import run as runs
from llmkd.reporting import figures, judged, looks, rowwise, words
from llmkd.reporting.gather import PREPARE, family
from llmkd.reporting.pieces import dotted, escape, missing, plot, section, table
from llmkd.reporting.provenance import provenance

Plots = dict[str, Any]


def classifier(run: Path, data: dict[str, Any], plots: Plots) -> str:
    """The body of a classifier's report; its figures are left in `plots`."""
    labels = runs.manifest(run / PREPARE)["metrics"]["labels"]
    peers = list(data["metrics"].get("peers", {}))
    rows = judged.judged(run, data["units"], labels, data["student"], peers)
    tta = f"{data['shipped']}_tta"
    rows["name"] = tta if tta in data["metrics"] else data["shipped"]
    of = looks.colours([*data["scores"], *rows["folds"]])
    parts = [
        _opening(data, words.headline(data, judged.gap(rows)), _tiles(data, "log_loss", "log loss")),
        _scores(data, of),
        rowwise.losses(data, rows, of, plots),
        _courses(data, of, plots),
        rowwise.agreement(data, rows, plots),
        rowwise.calibration(data, rows, of, plots),
        _cost(data, of, plots, score="accuracy"),
        rowwise.confusion(rows, labels, plots),
        rowwise.differing(data, rows, labels),
        provenance(data),
    ]
    return "".join(parts)


def language(run: Path, data: dict[str, Any], plots: Plots) -> str:
    """The body of a language model's report."""
    of = looks.colours(list(data["scores"]))
    values = {name: row["perplexity"] for name, row in data["scores"].items()}
    dots = figures.dots(values, {}, of, what="perplexity (lower is better)", log=True)
    parts = [
        _opening(data, words.language_headline(data), _tiles(data, "perplexity", "perplexity")),
        _language_scores(data, of),
        section(
            "Perplexity",
            "Each model's perplexity on the same targets; the further left the better.",
            plot(plots, "losses", dots, "Perplexity of every model on the test texts."),
        ),
        _courses(data, of, plots),
        _continuations(data, of),
        _cost(data, of, plots, score="perplexity"),
        provenance(data),
    ]
    return "".join(parts)


def _opening(data: dict[str, Any], headline: str, tiles: str) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in words.notes(data))
    return (
        f"<header><p class='run'>llmkd report · {escape(data['name'])}</p>\n"
        f"<h1>{escape(headline)}</h1></header>\n"
        f"<div class='tiles'>{tiles}</div>\n<ul class='notes'>{notes}</ul>\n"
    )


def _tiles(data: dict[str, Any], score: str, what: str) -> str:
    metrics, digits = data["metrics"], 4 if score == "log_loss" else 2
    found = {f"{words.shipped_name(data)}, {what}": metrics[data["shipped"]][score]}
    if best := words.best_teacher(data, score):
        found[f"best teacher, {best[0]}"] = best[1]
    if "baseline" in metrics:
        found["same student on labels alone"] = metrics["baseline"][score]
    if "bayes_log_loss" in metrics:
        found["Bayes floor: no model is expected below"] = metrics["bayes_log_loss"]
    return "".join(
        f"<div class='tile'><b>{value:,.{digits}f}</b><span>{escape(name)}</span></div>"
        for name, value in found.items()
    )


def _scores(data: dict[str, Any], of: Mapping[str, str]) -> str:
    further = [name for name in ("auc", "amex") if any(name in row for row in data["scores"].values())]
    rows = []
    for name, row in data["scores"].items():
        told = [f"{row[key]:.4f}" if key in row else "" for key in ("log_loss", "accuracy", "ece", *further)]
        rows.append([dotted(name, of), *told, f"{row['rows']:,}"])
    metrics = data["metrics"]
    if "bayes_log_loss" in metrics:
        blank = [""] * (3 + len(further))
        rows.append(["Bayes floor", f"{metrics['bayes_log_loss']:.4f}", *blank])
    return section(
        "Scores",
        "All on test rows, which entered no fold and chose no checkpoint; the shipped artifact in bold.",
        table(
            ["model", "log loss", "accuracy", "ECE", *further, "rows"],
            rows,
            strong=list(data["scores"]).index(data["shipped"]),
        ),
    )


def _language_scores(data: dict[str, Any], of: Mapping[str, str]) -> str:
    teachers = list(data["metrics"]["teachers"])
    heads = [head for name in teachers for head in (f"KL to {name}", f"same top word as {name}")]
    rows = []
    for name, row in data["scores"].items():
        cells = [dotted(name, of), f"{row['perplexity']:,.2f}", f"{row['nll']:.4f}"]
        for one in teachers:
            near = f"kl/{one}" in row
            cells += [f"{row[f'kl/{one}']:.4f}", f"{row[f'agreement/{one}']:.1%}"] if near else ["", ""]
        rows.append([*cells, f"{row['tokens']:,.0f}", f"{row['tokens_per_second']:,.0f}"])
    return section(
        "Scores",
        "Means over all targets of the test texts, each counted once; the shipped artifact in bold.",
        table(
            ["model", "perplexity", "NLL", *heads, "targets", "tokens/s"],
            rows,
            strong=list(data["scores"]).index(data["shipped"]),
        ),
    )


def _courses(data: dict[str, Any], of: Mapping[str, str], plots: Plots) -> str:
    says = "How each training went, term by term; pick a term to see it."
    if not data["curves"]:
        return section("Training", says, missing("No unit of this run logged a loss."))
    every = {name for curve in data["curves"] for name in (curve["model"], curve["against"]) if name}
    drawn, terms = figures.courses(data["curves"], {**looks.colours(sorted(every - of.keys())), **of})
    options = "".join(
        f"<option value='{escape(term)}'>{escape(name)}</option>" for term, name in terms.items()
    )
    pick = f"<label class='term'>Term<select data-plot='courses'>{options}</select></label>"
    caption = "Faint lines are folds, full lines their mean; terms are as logged, before their weights."
    return section("Training", says, pick, plot(plots, "courses", drawn, caption))


def _cost(data: dict[str, Any], of: Mapping[str, str], plots: Plots, *, score: str) -> str:
    metrics, low = data["metrics"], score == "perplexity"
    what = {"accuracy": "accuracy on test rows", "perplexity": "perplexity on test texts"}[score]
    values = {name: row[score] for name, row in data["scores"].items() if name == family(name)}
    sizes = {name: data["sizes"].get(name) or 0 for name in values}
    rates = {
        name: data["scores"][name].get("rows_per_second", data["scores"][name].get("tokens_per_second", 0))
        for name in values
    }
    if "latency" in metrics:
        rates[data["shipped"]] = metrics["latency"]["rows_per_second"]
        rates |= metrics["latency"].get("artifacts", {})
    unit, parts = "tokens/s" if data["causal"] else "rows/s", []
    for name, found, across, in_unit, told in (
        ("size", sizes, "weights on disk (logarithmic)", "B", "the size of the weights"),
        ("speed", rates, f"{unit} on the machine that judged (logarithmic)", unit, "speed"),
    ):
        points = {model: (float(x), values[model]) for model, x in found.items() if x}
        if len(points) > 1:
            drawn = figures.scatter(points, of, across=across, up=what, unit=in_unit, lower=low)
            caption = f"{what.capitalize()} against {told}: the higher the better."
            parts.append(plot(plots, name, drawn, caption))
    cells = [
        [
            dotted(name, of),
            looks.quantity(sizes[name], "B") if sizes[name] else "",
            f"{value:,.2f}" if low else f"{value:.4f}",
            f"{rates[name]:,.0f}" if rates[name] else "",
        ]
        for name, value in values.items()
    ]
    says = (
        "A teacher's, student's or baseline's weights are one fold's: base and adapter. A base that only a "
    )
    says += "hub has counts two bytes a known parameter. Blank: not known."
    return section("Size and speed", says, *parts, table(["model", "weights", score, unit], cells))


def _continuations(data: dict[str, Any], of: Mapping[str, str]) -> str:
    says = (
        "What each model goes on with, greedily, after the first words of some test texts, which stand here: "
    )
    says += "evaluate.continuations: 0 leaves them out."
    parts, order = list[str](), [*data["scores"], *data["metrics"]]
    for one in data["metrics"]["continuations"]:
        rows = [
            [dotted(name, of), escape(" ".join(text.split()))]
            for name, text in sorted(one["said"].items(), key=lambda item: order.index(item[0]))
        ]
        lines = "".join(f"<tr><td>{name}</td><td class='said'>{text}</td></tr>" for name, text in rows)
        parts.append(
            f"<blockquote>{escape(' '.join(one['prompt'].split()))} …</blockquote>"
            f"<div class='scroll' tabindex='0'><table><tbody>{lines}</tbody></table></div>\n"
        )
    return section(
        "Continuations", says, *(parts or [missing("None was asked for (evaluate.continuations: 0).")])
    )
