"""Programs for whoever works on this project; nothing of them is installed."""
