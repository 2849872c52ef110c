"""A results file, and the tables, pictures and pages that are made of it."""
