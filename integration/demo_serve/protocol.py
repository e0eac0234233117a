"""What an engine's process and the one that asks it agree on."""

ANSWER = "answer: "  # starts the lines of an engine's stdout that are JSON
