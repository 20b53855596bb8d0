"""What averages parameters: the groups of ranks, rounds of averages, and the hooks that follow an optimizer."""
