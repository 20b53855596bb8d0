"""How far ranks are from the ideal iterate (Nadiradze et al., 2001.05918): measured, bounded, controlled."""
