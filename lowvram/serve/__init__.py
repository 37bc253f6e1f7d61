"""An OpenAI-compatible server of one model that answers many requests at a time; knows no command line."""
