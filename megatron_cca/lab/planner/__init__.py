"""What a layout costs before anyone pays for it: memory, step time, the search over layouts, a dry run of any rank."""
