"""The papers' tables at toy size: what each compares, how it is run, and which orderings it should show."""
