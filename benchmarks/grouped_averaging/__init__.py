"""DS-Sync (2007.03298): speed on thin networks, stragglers, quality."""
