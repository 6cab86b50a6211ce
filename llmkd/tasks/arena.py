"""Embedded preference data: a small world of English whose class probabilities are known exactly.

Every prompt asks about a topic. An answer gains from facts that are true of that topic, loses from false
ones and from facts of another topic, and is weighed on tone, on the format asked for and on its length.
The difference d of the two qualities gives P(a), P(b), P(tie) by Davidson's tie model
(J. Am. Stat. Assoc. 65, 1970), and the label is drawn from it: the mean entropy of `bayes` is the
log loss that no model can beat.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Judge = Literal["human", "machine"]
Floats = npt.NDArray[np.float64]

# what a topic is called, and the facts true of it
TOPICS: tuple[tuple[tuple[str, str], tuple[str, ...]], ...] = (
    (("bread", "dough"), ("flour", "yeast", "salt")),
    (("guitar", "music"), ("strings", "chords", "melody")),
    (("garden", "flowerbed"), ("soil", "seeds", "compost")),
    (("bicycle", "bike"), ("pedals", "brakes", "tyres")),
)
FALSE_CLAIMS = ("varnish", "petrol", "gravy", "mustard")
ASKERS = ("children", "my class", "friends", "my mother", "visitors", "our club", "beginners", "my team")
OPENINGS = (
    "explain the {topic} to {who}",
    "tell {who} about the {topic}",
    "describe the {topic} to {who}",
    "write to {who} about the {topic}",
    "teach {who} the {topic}",
)
PLACES = ("indoors", "outdoors", "abroad", "nearby", "online", "upstairs", "downtown", "here")
TIMES = (
    "today",
    "this week",
    "in spring",
    "next month",
    "at night",
    "in summer",
    "on sunday",
    "this year",
    "in autumn",
    "tomorrow",
    "this morning",
    "in winter",
    "after lunch",
    "tonight",
    "in may",
    "soon",
)
FORMATS = ("as a list", "as prose", "")
TONES: tuple[tuple[str, float], ...] = (
    ("gladly", 1.2),
    ("sure", 1.2),
    ("well", 0.0),
    ("so", 0.0),
    ("boring", -1.2),
    ("silly question", -1.2),
)
CLAUSES = ("use {fact}", "it needs {fact}", "look at the {fact}", "start with {fact}")
CLOSINGS: tuple[tuple[str, float], ...] = (
    ("hope this helps", 0.6),
    ("that is all", 0.0),
    ("bye", 0.0),
    ("go away", -1.0),
)
FILLERS = ("as many say", "or so", "some time")

TRUE, FALSE, FOREIGN = 0.7, -1.6, -0.5
TRUE_SHARE, FALSE_SHARE = 0.5, 0.4
FORMAT_KEPT, FORMAT_BROKEN = 0.2, -0.4
LENGTH_WORTH = (-0.3, 0.3)
FILLER_SHARE, FILLER_WORTH = 0.2, -0.4
MAX_CLAUSES = len(LENGTH_WORTH)
TIE_LOG_WEIGHT = {"human": 0.1, "machine": -1.0}
SHARPNESS = {"human": 1.0, "machine": 2.0}
FIRST_BIAS = {"human": 0.0, "machine": 0.4}


def generate(rows: int, seed: int, *, judge: Judge = "human") -> pa.Table:
    """Preference rows: prompt, response_a, response_b, label (0 a, 1 b, 2 tie), bayes (three floats).

    About half of the prompts stand in two or three rows. The "human" judge is fair; the "machine" judge
    sees the same texts but is sharper and leans to the first answer, so its `bayes` holds for the
    order given only. The same arguments give the same table on every machine.
    """
    rng = np.random.default_rng(seed)
    prompt_of = rng.permutation(np.repeat(np.arange(rows), rng.integers(1, 4, rows))[:rows])
    draws = rng.random((rows, 6))
    prompts = [_prompt(draw) for draw in draws]
    answers = [
        [answer(draw, *prompts[of][1:]) for draw, of in zip(side, prompt_of, strict=True)]
        for side in rng.random((2, rows, 5 + 2 * MAX_CLAUSES))
    ]
    gap = np.array([a[1] - b[1] for a, b in zip(*answers, strict=True)]).reshape(rows)
    bayes = probabilities(gap, judge)
    labels = (rng.random((rows, 1)) > np.cumsum(bayes, axis=1)[:, :2]).sum(axis=1)
    return pa.table(
        {
            "prompt": pa.array([prompts[of][0] for of in prompt_of], pa.string()),
            "response_a": pa.array([text for text, _ in answers[0]], pa.string()),
            "response_b": pa.array([text for text, _ in answers[1]], pa.string()),
            "label": pa.array(labels, pa.int32()),
            "bayes": pa.array(list(bayes.astype(np.float32)), pa.list_(pa.float32())),
        }
    )


def probabilities(gap: Floats, judge: Judge) -> Floats:
    """P(a), P(b), P(tie), shape (N, 3), of answers whose qualities differ by `gap`, shape (N,)."""
    half = (SHARPNESS[judge] * gap + FIRST_BIAS[judge]) / 2
    weights = np.exp(np.stack([half, -half, np.full_like(half, TIE_LOG_WEIGHT[judge])], axis=1))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def texts(rows: int, seed: int) -> list[str]:
    """Plain documents of the same world, for pretraining a language model: a question and a true answer."""
    rng = np.random.default_rng(seed)
    documents = []
    for draw in rng.random((rows, 11 + 2 * MAX_CLAUSES)):
        prompt, topic, wanted = _prompt(draw[:6])
        kinds = slice(11, 11 + MAX_CLAUSES)
        draw[kinds] *= TRUE_SHARE
        documents.append(f"{prompt}\n{answer(draw[6:], topic, wanted)[0]}")
    return documents


def _pick(draw: float, count: int) -> int:
    return int(draw * count)


def _prompt(draw: Floats) -> tuple[str, int, str]:
    """The prompt's text, its topic and the format it asks for."""
    topic = _pick(draw[0], len(TOPICS))
    name = TOPICS[topic][0][_pick(draw[0] * len(TOPICS) % 1, 2)]
    who, wanted = ASKERS[_pick(draw[1], len(ASKERS))], FORMATS[_pick(draw[2], len(FORMATS))]
    opening = OPENINGS[_pick(draw[3], len(OPENINGS))].format(who=who, topic=name)
    where, when = PLACES[_pick(draw[4], len(PLACES))], TIMES[_pick(draw[5], len(TIMES))]
    return " ".join(filter(None, (opening, where, when, wanted))), topic, wanted


def answer(draw: Floats, topic: int, wanted: str) -> tuple[str, float]:
    """An answer's text and its quality."""
    tone, tone_worth = TONES[_pick(draw[0], len(TONES))]
    closing, closing_worth = CLOSINGS[_pick(draw[1], len(CLOSINGS))]
    count = 1 + _pick(draw[2], MAX_CLAUSES)
    listed = draw[3] < 0.5
    filler = FILLERS[_pick(draw[4] / FILLER_SHARE, len(FILLERS))] if draw[4] < FILLER_SHARE else ""
    facts = [
        _clause(kind, place, topic)
        for kind, place in zip(
            draw[5 : 5 + count], draw[5 + MAX_CLAUSES : 5 + MAX_CLAUSES + count], strict=True
        )
    ]
    body = _body([text for text, _ in facts], filler, listed=listed)
    worth = sum(value for _, value in facts) + LENGTH_WORTH[count - 1]
    worth += tone_worth + closing_worth + _format_worth(wanted, listed=listed) + FILLER_WORTH * bool(filler)
    return f"{tone}{body}{closing}", worth


def _body(clauses: list[str], filler: str, *, listed: bool) -> str:
    if listed:
        return "\n" + "\n".join(f"- {clause}" for clause in (*clauses, filler) if clause) + "\n"
    return ". " + " and ".join(clause for clause in (*clauses, filler) if clause) + ". "


def _format_worth(wanted: str, *, listed: bool) -> float:
    if not wanted:
        return 0.0
    return FORMAT_KEPT if listed == (wanted == "as a list") else FORMAT_BROKEN


def _clause(kind: float, place: float, topic: int) -> tuple[str, float]:
    """A clause with one fact and its worth: true of the topic, false of it, or true of another one."""
    if kind < TRUE_SHARE:
        source, worth = TOPICS[topic][1], TRUE
    elif kind < TRUE_SHARE + FALSE_SHARE:
        source, worth = FALSE_CLAIMS, FALSE
    else:
        step = 1 + _pick(kind * 1e3 % 1, len(TOPICS) - 1)
        source, worth = TOPICS[(topic + step) % len(TOPICS)][1], FOREIGN
    wording = CLAUSES[_pick(place, len(CLAUSES))]
    return wording.format(fact=source[_pick(place * len(CLAUSES) % 1, len(source))]), worth
