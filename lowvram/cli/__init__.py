"""The command line: the only code that reads arguments, prints and exits."""
