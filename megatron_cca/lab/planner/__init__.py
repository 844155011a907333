"""The cost of a layout before a run: memory, step time, the search over layouts, and a dry run of any rank."""
