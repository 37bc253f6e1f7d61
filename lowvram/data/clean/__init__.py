"""Cleaning of text: rules, duplicates, the folder of the result and its report."""
