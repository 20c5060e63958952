"""What `trimvlm inspect` reports. Each file gives a report as plain data, or its text for people."""
