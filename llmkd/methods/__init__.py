"""How a student learns, one nn.Module a file.

A method holds the model it trains as `student` and turns one micro-batch (`inputs`, `labels`,
`teacher_logits`) into a loss a row, shape (B,), and its named parts.
"""
