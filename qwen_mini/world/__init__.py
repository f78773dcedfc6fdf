"""The small world that all chapters draw from: words, problems, needles; nothing here imports a chapter."""
