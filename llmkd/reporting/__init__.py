"""A finished run as one HTML file that opens from disk and asks for nothing from any network."""

from pathlib import Path


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run whose stage 06 is finished, by default to `run`/report.html; its path.

    Atomic. The file holds ids, labels and probabilities of single rows, never their texts; of a language
    model, what metrics.json keeps of its continuations. Raises RunError where stage 06 has not finished, or
    where a unit was made anew since.
    """
    from llmkd.reporting.page import page, write

    return write(page(run), output or run / "report.html")
