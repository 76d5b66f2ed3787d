"""From a click log to groups of titles: sums, checks, and whether chance dealt out the impressions."""
