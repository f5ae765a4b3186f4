"""The names of the files of results that no other stage writes."""

LEADERBOARD = "leaderboard.parquet"
COMPARISON = "comparison.parquet"
REPORT = "report.html"
FIGURES = "figures"  # a folder
