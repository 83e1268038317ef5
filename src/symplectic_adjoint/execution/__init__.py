"""How steps and their transposes are run: by Python, or compiled."""
