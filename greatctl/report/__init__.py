"""From sealed tables to one HTML file that opens without a network."""
