"""`python -m llmkd.cli`, as `llmkd`."""

from llmkd.cli import main

main()
