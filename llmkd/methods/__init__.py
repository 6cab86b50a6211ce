"""How a student learns, one nn.Module a file.

A method holds the model it trains as `student` and turns one micro-batch (`inputs`, `labels`,
`teacher_logits`, and `beside`: the same rows as other models read them, by name) into a loss a row,
shape (B,), and its named parts. What else it trains, heads, projectors or peers, are its submodules too.
"""
