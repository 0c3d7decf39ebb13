"""From records and arrays to tables, JSON and one self-contained HTML file; no reading or writing here."""
