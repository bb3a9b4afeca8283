"""Speed measurements against known references."""
