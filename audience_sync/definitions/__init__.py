"""What to compute: audiences and computed traits, their keys and their SQL. Pure: no database, no network."""
