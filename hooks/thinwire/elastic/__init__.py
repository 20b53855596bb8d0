"""What is late, and when it is applied: elastic scheduling, whatever the front door."""
