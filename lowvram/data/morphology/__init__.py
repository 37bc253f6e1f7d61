"""Cuts words into stem and suffixes by a language's rules, with stems learnt from word counts."""
