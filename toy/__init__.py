"""The harmless toy world: its pictures, and the oracle that reads them back. Imports no other room."""
