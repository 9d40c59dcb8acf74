"""The paper's tables and figures as recipes: what they are, training their rows, writing them beside the paper's."""
