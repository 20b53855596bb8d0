"""What every room uses: records and their tables, scripts run on every rank, the text task."""
