"""Who computes next? From a request to its tokens, sweep by sweep."""
