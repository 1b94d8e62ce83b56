"""Files, records, devices: what every folder may use."""
