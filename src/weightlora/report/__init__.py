"""Pictures and tables of stored plans and records: computing first, drawing last. Needs no torch."""
