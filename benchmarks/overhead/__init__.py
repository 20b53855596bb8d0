"""What a hook costs where the network costs nothing."""
