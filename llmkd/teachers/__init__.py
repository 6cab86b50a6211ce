"""What gives logits besides the models of `llmkd.models`, one file a kind: each puts logits beside ids."""
