"""What a process runs that is driven by a line of JSON each way."""
